# Code of kromhc-hf, which travels with every model that it saves.
"""Where the hyper-connections of a model go: its decoder layers are found, and all checked before anything changes."""

from typing import Any, NamedTuple

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from .arrangement import check_distinct
from .composite import models_to_text_model
from .decoder_layer import HyperConnectedLayer
from .layer_fit import check_family, check_own_forward, fit_layer, layer_specs
from .layer_loop import check_between_layers
from .layer_spec import END_NAMES, LayerSpec, attribute
from .model_types import PREFIX
from .outside_families import outside_family


class Decoder(NamedTuple):
    """The decoder layers of a model and everything that owns them, found but not checked.

    Args:
        owners: the transformers models from the outermost inwards; the last one holds the decoder layers.
        layers: the `nn.ModuleList` of the decoder layers.
        path: from the last owner to the layers.
        candidates: what each of them may look like.
    """

    owners: list[Any]
    layers: Any
    path: str
    candidates: tuple[LayerSpec, ...]

    @property
    def connected(self) -> list[HyperConnectedLayer]:
        """The layers with hyper-connections, which need not be all of them."""
        return [layer for layer in self.layers if isinstance(layer, HyperConnectedLayer)]

    @property
    def added_names(self) -> set[str]:
        """The names of the modules that hyper-connections have added to the layers."""
        names = ((name, getattr(layer, name)) for layer in self.connected for name in (*layer.spec.names, *END_NAMES))
        return {name for name, module in names if module is not None}


class ConnectionPlan(NamedTuple):
    """A decoder with the specification of every layer, which has been checked."""

    decoder: Decoder
    specs: list[LayerSpec]


def find_decoder(model: Any) -> Decoder:
    """Finds the decoder layers of a model, with hyper-connections or without.

    Raises:
        ValueError: if the family is not supported, or the layers are not where its row says.
    """
    check_family(model.config, model.config.model_type.removeprefix(PREFIX))
    text = model.config.get_text_config()
    candidates = layer_specs(text, text.model_type.removeprefix(PREFIX))
    path = candidates[0].layers
    if text is model.config:
        # A base_model_prefix that names nothing makes the model its own base; the base is then one of its children.
        bases = [model.base_model, *(child for child in model.children() if isinstance(child, PreTrainedModel))]
        owners: list[Any] = [model]
        module: Any = next((base for base in bases if attribute(base, path) is not None), model)
    else:
        owners = models_to_text_model(model, path)
        module = owners[-1]
    rest = path.split(".")
    for i in range(len(rest) + 1):
        if isinstance(module, PreTrainedModel):
            path = ".".join(rest[i:])
            if module is not owners[-1]:
                owners.append(module)
        if i < len(rest):
            module = attribute(module, rest[i])
    if not isinstance(module, nn.ModuleList) or len(module) == 0:
        raise ValueError(
            f"{type(model).__name__} must have its decoder layers at {candidates[0].layers!r} of the base model; "
            f"got {module!r}."
        )
    return Decoder(owners, module, path, candidates)


def plan_connections(model: Any) -> ConnectionPlan:
    """Finds the decoder layers of a model and checks that hyper-connections can be added to every one of them.

    Raises:
        ValueError: if the family is not supported, or a layer is not what the table of families says.
    """
    return check_layers(find_decoder(model))


def check_layers(decoder: Decoder) -> ConnectionPlan:
    """The plan for decoder layers that have no hyper-connections yet.

    Raises:
        ValueError: if one of them is not what the table of families says.
    """
    layers, expected = decoder.layers, decoder.owners[-1].config.num_hidden_layers
    if len(layers) < expected:
        raise ValueError(
            f"the model must have config.num_hidden_layers = {expected} decoder layers, since the last one reads "
            f"the streams out; got {len(layers)}. Set config.num_hidden_layers = {len(layers)}."
        )
    check_partitioned_dtype(layers)
    check_distinct(layers)
    check_own_forward(decoder.owners[-1])
    check_between_layers(decoder.owners[-1], decoder.path)
    return ConnectionPlan(decoder, [_fitted(decoder, position) for position in range(len(layers))])


def _fitted(decoder: Decoder, position: int) -> LayerSpec:
    config = decoder.owners[-1].config
    outside = outside_family(config, config.model_type.removeprefix(PREFIX))
    return fit_layer(decoder.layers[position], decoder.candidates, position, outside)


def check_partitioned_dtype(model: nn.Module) -> None:
    """Refuses parameters of 16 bits that DeepSpeed ZeRO-3 has partitioned: all of its parameters have one dtype.

    Raises:
        ValueError: with the settings that keep hyper-connections in fp32.
    """
    narrow = next((p.dtype for p in model.parameters() if hasattr(p, "ds_shape") and p.dtype.itemsize < 4), None)
    if narrow is not None:
        raise ValueError(
            f"DeepSpeed ZeRO-3 keeps all parameters in one dtype, and those of hyper-connections must be fp32; got "
            f'{narrow}. Set "bf16" and "fp16" to {{"enabled": false}} in the configuration of DeepSpeed, and '
            '"torch_autocast" to {"enabled": true, "dtype": "bfloat16"} for low precision.'
        )


def present_plan(decoder: Decoder) -> ConnectionPlan:
    """The plan that decoder layers with hyper-connections were made by; without, the one that they would be made by."""
    if not decoder.connected:
        return check_layers(decoder)
    layers = enumerate(decoder.layers)
    specs = [layer.spec if isinstance(layer, HyperConnectedLayer) else _fitted(decoder, i) for i, layer in layers]
    return ConnectionPlan(decoder, specs)
