"""Runs a checkpoint with one decoder layer in memory at a time, for models that do not fit.

The model is built without weights. Embeddings, norms and head are loaded once; the weights of a layer come when it is
called and go when it has returned.
"""

import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictConfig

from ..modeling.connection_plan import find_decoder, present_plan
from ..modeling.decoder_layer import HyperConnectedLayer
from ..modeling.host import forward_defaults, forward_parameters, load_tensors
from ..modeling.layer_returns import returned_beside, returned_values
from ..modeling.stream_ends import expand, mean_of_streams
from .quantised import Blank, layer_quantizer, prepare
from .stored_model import StoredModel, head_output
from .stored_tensors import check_tensors, places_in_model


class LayerwiseModel:
    """A model whose decoder layers are loaded one at a time, from safetensors or `.bin` files.

    Args:
        source: the checkpoint, opened or its folder.
        dtype: of the model; "auto" for the one it is stored in.

    Raises:
        ValueError: if the checkpoint is damaged, incomplete, quantised by a method that needs the whole model, or its
            family is not supported.
    """

    def __init__(self, source: StoredModel | str | os.PathLike[str], dtype: torch.dtype | str = "auto"):
        stored = source if isinstance(source, StoredModel) else StoredModel.open(source)
        quantizer = layer_quantizer(stored.config, stored.folder)
        self.source = stored.tensors()
        chosen = self.source.dtype(stored.config) if dtype == "auto" else dtype
        self.dtype: torch.dtype = getattr(torch, chosen) if isinstance(chosen, str) else chosen
        self.model = stored.skeleton(self.dtype)
        decoder, self.specs = present_plan(find_decoder(self.model))
        self.layers = decoder.layers
        if quantizer is not None:
            prepare(self.model, quantizer, self.dtype, self.source)
        conversions: Any = get_model_conversion_mapping(self.model, hf_quantizer=quantizer)
        dtype_plan = self.model._get_dtype_plan(self.dtype)
        self.loading = LoadStateDictConfig(
            dtype=self.dtype, dtype_plan=dtype_plan, hf_quantizer=quantizer, weight_mapping=conversions
        )
        path, names = self.specs[0].layers, {name: name for name in self.source.names}
        if self.model.config.get_text_config() is not self.model.config:
            # Layers of other parts have such names as well.
            path = next(path for path, module in self.model.named_modules() if module is decoder.layers)
            names = {n: place.name for n, place in places_in_model(self.model, self.source.names).items()}
        pattern = re.compile(rf"(?:^|\.){re.escape(path)}\.(\d+)\.")
        # The names of packed weights are the method's, and what of them is missing shows when they are loaded.
        check_tensors(stored.skeleton(), self.source, only=pattern if quantizer is None else None)
        self.pattern = pattern
        found = {name: pattern.search(inside) for name, inside in names.items()}
        self.names: dict[int | None, list[str]] = {}
        for name, match in found.items():
            self.names.setdefault(int(match[1]) if match else None, []).append(name)
        self._load_shared()

    @torch.no_grad()
    def run(self, input_ids: Tensor, layers: Sequence[int], **inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What the head computes, such as logits `[1, S, V]`, in fp32, and the hidden states behind some layers.

        Other layers are left out: they return what they are given. Hidden states are `[1, S, C]`; streams are shown as
        their mean.

        Args:
            input_ids: `[1, S]`.
            layers: ascending positions.
            **inputs: further inputs of a model of several modalities.
        """
        states: list[Tensor] = []
        blank: dict[Any, Blank] = {}

        # What a hook in front of a layer returns would be its new input.
        def fetch(position: int) -> Any:
            def load(layer: Any, *_: Any) -> None:
                blank[layer] = Blank(layer)
                self._load_layer(position)

            return load

        def record(layer: Any, _: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            states.append(mean_of_streams(hidden) if hidden.dim() == 4 else hidden)
            blank.pop(layer).restore()

        for config in (self.model.config, self.model.config.get_text_config()):
            config.use_cache = False  # not as an argument, which some heads do not take
        handles = []
        try:
            for position, layer in enumerate(self.layers):
                if position in layers:
                    handles.append(layer.register_forward_pre_hook(fetch(position)))
                    handles.append(layer.register_forward_hook(record))
                else:
                    layer.forward = self._pass_through(position)
            return head_output(self.model(input_ids=input_ids, **inputs)).float(), states
        finally:
            for handle in handles:
                handle.remove()
            for layer in self.layers:
                vars(layer).pop("forward", None)

    def _pass_through(self, position: int) -> Any:
        layer = self.layers[position]
        layer_class: Any = getattr(layer, "layer_class", type(layer))
        connected = layer if isinstance(layer, HyperConnectedLayer) else None
        returned = returned_beside(layer, layer_class) if connected is None else connected.interface.returned
        names, defaults = forward_parameters(layer_class)[0][1:], forward_defaults(layer_class)

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if connected is not None and position == connected.hc_first_layer:
                hidden_states = expand(hidden_states, connected.hc_options.num_streams)
            if connected is not None and position == connected.hc_last_layer and not connected.reads_out_after_norm():
                hidden_states = mean_of_streams(hidden_states)
            if returned is None:
                return hidden_states
            return hidden_states, *returned_values(returned, {}, defaults | dict(zip(names, args)) | kwargs)

        return forward

    def _load(self, names: list[str]) -> Any:
        return load_tensors(self.model, self.source.read(names), self.loading)

    def _load_layer(self, position: int) -> None:
        info = self._load(self.names.get(position, []))
        found = ((name, self.pattern.search(name)) for name in info.missing_keys)
        missing = {name for name, match in found if match and int(match[1]) == position}
        if wrong := sorted(missing | {*info.conversion_errors} | {name for name, *_ in info.mismatched_keys}):
            raise ValueError(
                f"a checkpoint must hold the tensors of its layers; layer {position} of {self.source.folder} lacks "
                f"{wrong[0]}, or has it in another form. Fetch its files again."
            )

    def _load_shared(self) -> None:
        """Everything outside the decoder layers, and the buffers that are in no checkpoint."""
        info = self._load(self.names.get(None, []))
        # Layers stay without weights, which costs their initialisation nothing; packed ones have none.
        for tensor in self.layers.state_dict(keep_vars=True).values():
            if not tensor.is_floating_point():
                tensor._is_hf_initialized = True
        self.model.mark_tied_weights_as_initialized(info)
        self.model._move_missing_keys_from_meta_to_device(set(), None, None, None)
        self.model._initialize_missing_keys(self.loading.is_quantized)
        self.model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
