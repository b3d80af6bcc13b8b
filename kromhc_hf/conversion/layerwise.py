"""Runs a checkpoint with one decoder layer in memory at a time, for models that do not fit.

The model is built without weights. Embeddings, norms and head are loaded once; the weights of a layer come when it is
called and go when it has returned.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from ..modeling.connection_plan import find_decoder, present_plan
from ..modeling.decoder_layer import HyperConnectedLayer
from ..modeling.stream_ends import expand, mean_of_streams
from .files import find_weights, read_json
from .tensor_files import read_pickled


class LayerwiseModel:
    """A causal language model whose decoder layers are loaded one at a time, from safetensors or `.bin` files.

    Args:
        folder: the checkpoint.
        dtype: of the model; "auto" for the one it is stored in.

    Raises:
        ValueError: if the checkpoint is damaged, or its family is not supported.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | str = "auto"):
        self.source = _Source(folder)
        config: Any = AutoConfig.from_pretrained(folder)
        chosen = self.source.dtype(config) if dtype == "auto" else dtype
        self.dtype: torch.dtype = getattr(torch, chosen) if isinstance(chosen, str) else chosen
        with torch.device("meta"):
            self.model: Any = AutoModelForCausalLM.from_config(config, dtype=self.dtype).eval()
        decoder, self.specs = present_plan(find_decoder(self.model))
        self.layers = decoder.layers
        conversions: Any = get_model_conversion_mapping(self.model)
        dtype_plan = self.model._get_dtype_plan(self.dtype)
        self.loading = LoadStateDictConfig(dtype=self.dtype, dtype_plan=dtype_plan, weight_mapping=conversions)
        pattern = re.compile(rf"(?:^|\.){re.escape(self.specs[0].layers)}\.(\d+)\.")
        found = {name: pattern.search(name) for name in self.source.names}
        self.names: dict[int | None, list[str]] = {}
        for name, match in found.items():
            self.names.setdefault(int(match[1]) if match else None, []).append(name)
        self._load_shared()

    @torch.no_grad()
    def run(self, tokens: Tensor, layers: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Logits `[1, S, V]` in fp32, and the hidden states `[1, S, C]` behind each of the given layers.

        Other layers are left out: they return what they are given. Streams are shown as their mean.

        Args:
            tokens: `[1, S]`.
            layers: ascending positions.
        """
        states: list[Tensor] = []

        # What a hook in front of a layer returns would be its new input.
        def fetch(position: int) -> Any:
            def load(*_: Any) -> None:
                self._load(self.names.get(position, []))

            return load

        def record(layer: Any, _: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            states.append(mean_of_streams(hidden) if hidden.dim() == 4 else hidden)
            _forget(layer)

        for position, layer in enumerate(self.layers):
            if position in layers:
                layer.register_forward_pre_hook(fetch(position))
                layer.register_forward_hook(record)
            else:
                layer.forward = self._pass_through(position)
        return self.model(tokens, use_cache=False).logits.float(), states

    def _pass_through(self, position: int) -> Any:
        extras, is_last = self.specs[position].extras, position == len(self.layers) - 1
        num_streams = self.layers[0].hc_options.num_streams if isinstance(self.layers[0], HyperConnectedLayer) else None

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if position == 0 and num_streams is not None:
                hidden_states = expand(hidden_states, num_streams)
            if is_last and hidden_states.dim() == 4:
                hidden_states = mean_of_streams(hidden_states)
            return hidden_states if extras is None else (hidden_states, *(None for _ in extras))

        return forward

    def _load(self, names: list[str]) -> Any:
        return convert_and_load_state_dict_in_model(self.model, self.source.read(names), self.loading)[0]

    def _load_shared(self) -> None:
        """Everything outside the decoder layers, and the buffers that are in no checkpoint."""
        info = self._load(self.names.get(None, []))
        # Layers stay without weights, which costs their initialisation nothing.
        self.model.mark_tied_weights_as_initialized(info)
        self.model._move_missing_keys_from_meta_to_device(set(), None, None, None)
        self.model._initialize_missing_keys(False)
        self.model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)


class _Source:
    """The tensors of a checkpoint, read from disk when they are asked for."""

    def __init__(self, folder: Path):
        weights = find_weights(folder, read_json(folder / "config.json"))
        self.folder = folder
        self.files: dict[str, str] = {} if weights.pickled else weights.tensors
        self.pickled: dict[str, Tensor] = {}
        for file in weights.files if weights.pickled else ():
            self.pickled.update(read_pickled(folder / file))
        self.names = [*self.files, *self.pickled]

    def read(self, names: list[str]) -> dict[str, Any]:
        """Tensors, or slices of files that are read where they are used; files stay open no longer than those."""
        shards = {
            file: safe_open(self.folder / file, "pt") for file in {self.files[n] for n in names if n in self.files}
        }
        return {n: shards[self.files[n]].get_slice(n) if n in self.files else self.pickled[n] for n in names}

    def dtype(self, config: Any) -> torch.dtype | str:
        """The dtype that the model is stored in: what its configuration says, or that of its first float tensor."""
        if getattr(config, "dtype", None) is not None:
            return config.dtype
        first = (self.read([name])[name][:] for name in self.names)
        return next((tensor.dtype for tensor in first if tensor.is_floating_point()), torch.float32)


def _forget(layer: nn.Module) -> None:
    """Drops the parameters of a layer."""
    for module in layer.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
