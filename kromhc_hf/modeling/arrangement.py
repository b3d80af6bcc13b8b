# Code of kromhc-hf, which travels with every model that it saves.
"""Where every decoder layer of a live model is now: layers may be dropped, moved, copied or replaced at any time."""

from typing import Any

from .decoder_layer import HyperConnectedLayer
from .stream_ends import READOUTS


Layers = list[HyperConnectedLayer | None]


def arrange(layers: Any, config: Any) -> None:
    """Tells every layer its position, and the configuration of the model that it is in.

    Args:
        layers: the list of the decoder layers, which may be wrapped one by one.
        config: of the model that holds them.

    Raises:
        ValueError: if streams could not pass through these layers; they are then what they were.
    """
    last = len(layers) - 1
    # Every forward comes by here, and nearly always there is nothing to do.
    if all(
        isinstance(layer, HyperConnectedLayer)
        and layer.hc_config is config
        and layer.hc_layer_index == position
        and layer.hc_is_last == (position == last)
        for position, layer in enumerate(layers)
    ):
        return
    found = [connected_layer(layer) for layer in layers]
    _check_one_stage(layers, found)
    check_arrangement(found, config)
    for position, layer in enumerate(found):
        if layer is not None:
            layer.hc_config, layer.hc_layer_index, layer.hc_is_last = config, position, position == last


def connected_layer(layer: Any) -> HyperConnectedLayer | None:
    """A decoder layer with hyper-connections, also where it is wrapped as by FSDP; None for a plain one."""
    return next((part for part in layer.modules() if isinstance(part, HyperConnectedLayer)), None)


def _check_one_stage(layers: Any, found: Layers) -> None:
    for position, layer in enumerate(layers):
        # Such as vLLM puts where the layers of other pipeline stages were.
        if found[position] is None and next(layer.parameters(), None) is None:
            raise ValueError(
                "all decoder layers of a model with hyper-connections must be in one pipeline stage, since stages pass "
                f"on [B, S, C] and streams are [B, S, n, C]; layer {position} is an empty {type(layer).__name__}. Use "
                "tensor or data parallelism instead, and take a layer that is not wanted out of the list."
            )


def check_distinct(layers: Any) -> None:
    """Refuses a list that names a layer twice.

    Raises:
        ValueError: with the way out.
    """
    if len({id(layer) for layer in layers}) < len(layers):
        raise ValueError(
            "every decoder layer must be a module of its own; got one that is used several times. "
            "Use copy.deepcopy(layer)."
        )


def check_arrangement(layers: Layers, config: Any) -> None:
    """Refuses decoder layers that streams could not pass through from the first one to the last.

    Raises:
        ValueError: naming the layer and the way out.
    """
    found = [None if layer is None else layer.hc_options for layer in layers]
    options = next(filter(None, found), None)
    if options is None:
        return  # adapters that are switched off
    for position, own in enumerate(found):
        if own != options:
            raise ValueError(
                f"every decoder layer must have hyper-connections of the same options, {options}; layer {position} has "
                f"{own or 'none'}. Change the layers of the plain model and give it hyper-connections afterwards, or "
                "take layers from a model with the same options."
            )
    check_distinct(layers)
    _check_end(layers, "expand_hc", 0, options.stream_embedding)
    last = min(len(layers), config.num_hidden_layers) - 1
    _check_end(layers, "readout_hc", last, READOUTS[options.readout].module is not None)


def _check_end(layers: Any, name: str, home: int, learned: bool) -> None:
    for position, layer in enumerate(layers):
        wanted = learned and position == home
        if (layer.end(name) is not None) != wanted:
            raise ValueError(
                f"layer {home} of {len(layers)}, at one end of the streams, must have the learned {name!r} and no "
                f"other layer may; layer {position} has {'none' if wanted else 'one'}. Hand the module over and set it "
                "to None in the other layers, or use options without learned ends: readout='mean', "
                "stream_embedding=False."
            )


def check_complete(layers: Any, config: Any) -> None:
    """Refuses to save layers that its configuration would not make again.

    Raises:
        ValueError: naming what differs and the way out.
    """
    if len(layers) != config.num_hidden_layers:
        raise ValueError(
            f"a model must be saved with config.num_hidden_layers = {config.num_hidden_layers} decoder layers, which "
            f"is how many are made when it is loaded; got {len(layers)}. Set config.num_hidden_layers = {len(layers)}."
        )
    found = [connected_layer(layer) for layer in layers]
    check_arrangement(found, config)
    options = config.stream_options()
    if found[0] is None or found[0].hc_options != options:
        raise ValueError(
            f"the layers of a model must be saved with the options of its configuration, {options}; got "
            f"{found[0] and found[0].hc_options}. Make the configuration agree with the layers."
        )
