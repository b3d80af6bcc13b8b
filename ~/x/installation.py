# Code of kromhc-hf, which travels with every model that it saves.
"""Hyper-connections put into the layers and models of a checked plan, and taken out again."""

from collections.abc import Callable
from typing import Any

from .arrangement import arrange
from .connection_plan import ConnectionPlan, Decoder
from .decoder_layer import connect_layer, disconnect_layer
from .host import record_outputs_of


def install(plan: ConnectionPlan, model_class: Callable[[Any, Any], Any]) -> None:
    """Carries a checked plan out: every owner and every layer gets the class with hyper-connections, in place.

    The modules hold their KromHCConfig already; `model_class` makes the class of an owner that has its own.
    """
    owners, layers, _, _ = plan.decoder
    config = owners[-1].config
    options = config.stream_options()
    # There may be more layers than the configuration says.
    for position in range(len(layers)) if options.layers is None else options.layers_of(config.num_hidden_layers):
        connect_layer(layers[position], plan.specs[position], config, options, position)
    arrange(layers, config)
    connect_owners(plan.decoder, model_class)


def connect_owners(decoder: Decoder, model_class: Callable[[Any, Any], Any]) -> None:
    """Gives the models around connected layers the class with hyper-connections, where they have their own."""
    owners, layers, path, _ = decoder
    before, added = {layer.layer_class.__name__ for layer in decoder.connected}, decoder.added_names
    for owner in owners:
        if not hasattr(owner, "backbone_class"):
            owner.__class__ = model_class(type(owner), type(owner.config))
        owner._keep_in_fp32_modules_strict = {*(owner._keep_in_fp32_modules_strict or ()), *added}
        owner._keep_in_fp32_modules = {*(owner._keep_in_fp32_modules or ()), *_wherever(added)}
        _tell_transformers(owner, before, layers)
    owners[-1].hc_layers_path = path


def uninstall(decoder: Decoder) -> None:
    """The inverse of `install`: the family's own classes again; the modules hold the family's configuration already."""
    before, added = {type(layer).__name__ for layer in decoder.connected}, decoder.added_names
    for layer in decoder.connected:
        disconnect_layer(layer)
    del decoder.owners[-1].hc_layers_path
    vars(decoder.owners[-1]).pop("hc_weights_are_random", None)
    for owner in decoder.owners:
        owner.__class__ = owner.backbone_class
        owner._keep_in_fp32_modules_strict = set(owner._keep_in_fp32_modules_strict) - added
        owner._keep_in_fp32_modules = set(owner._keep_in_fp32_modules) - _wherever(added)
        _tell_transformers(owner, before, decoder.layers)


def _wherever(names: set[str]) -> set[str]:
    """Patterns of everything in modules of these names, which quantisers leave alone whatever users have them match."""
    return {rf".*\.{name}" for name in names}


def _tell_transformers(owner: Any, before: set[str], layers: Any) -> None:
    """What transformers knows by class: which outputs are recorded, and which layers are not to be split."""
    record_outputs_of(owner)
    # FSDP wrapping refuses a name that no module of the model has, so the one from before goes.
    owner._no_split_modules = {*(owner._no_split_modules or ())} - before | {type(layer).__name__ for layer in layers}
