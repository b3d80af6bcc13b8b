# Code of kromhc-hf, which travels with every model that it saves.
"""Where every decoder layer of a live model is now: layers may be dropped, moved, copied or replaced at any time."""

from dataclasses import replace
from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer

from .decoder_layer import HyperConnectedLayer
from .layer_spec import LayerSpec
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
    # Every forward comes by here, and nearly always there is nothing to do.
    if _is_arranged(layers, config):
        return
    found = [connected_layer(layer) for layer in layers]
    check_one_stage(layers)
    check_arrangement(found, config)
    first, last = stretch(found)
    for position, layer in enumerate(found):
        if layer is not None:
            layer.hc_config, layer.hc_layer_index = config, position
            layer.hc_first_layer, layer.hc_last_layer = first, last


def _is_arranged(layers: Any, config: Any) -> bool:
    """Whether every layer knows where it is; False too where one is wrapped."""
    first, last = stretch(layers)
    if _misses_the_norm(layers, first, last, config):
        return False
    for position, layer in enumerate(layers):
        if isinstance(layer, HyperConnectedLayer):
            if layer.hc_config is not config or layer.hc_layer_index != position:
                return False
            if layer.hc_first_layer != first or layer.hc_last_layer != last:
                return False
        elif first <= position <= last or not isinstance(layer, GradientCheckpointingLayer):
            return False
    return True


def stretch(layers: Any) -> tuple[int, int]:
    """The positions of the first and of the last layer that runs with streams; (0, -1) if none does."""
    found = [i for i, layer in enumerate(layers) if isinstance(layer, HyperConnectedLayer) and layer.hc_options]
    return (found[0], found[-1]) if found else (0, -1)


def connected_layer(layer: Any) -> HyperConnectedLayer | None:
    """A decoder layer with hyper-connections, also where it is wrapped as by FSDP; None for a plain one."""
    return next((part for part in layer.modules() if isinstance(part, HyperConnectedLayer)), None)


def check_one_stage(layers: Any) -> None:
    """Refuses a list with empty layers.

    Raises:
        ValueError: with what to use instead.
    """
    for position, layer in enumerate(layers):
        # Such as vLLM puts where the layers of other pipeline stages were.
        if next(layer.parameters(), None) is None and connected_layer(layer) is None:
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
    first, last = stretch(layers)
    if last < 0:
        return  # adapters that are switched off
    options = layers[first].hc_options  # type: ignore[union-attr]
    everywhere = all(layer is None or layer.hc_options is None or layer.hc_options.layers is None for layer in layers)
    for position in range(len(layers)) if everywhere else range(first, last + 1):
        layer = layers[position]
        own = None if layer is None else layer.hc_options
        if own is None or (own != options and replace(own, layers=options.layers) != options):
            raise ValueError(
                f"every decoder layer{'' if everywhere else f' from {first} to {last}'} must have "
                f"hyper-connections of the same options, {options}; layer {position} has {own or 'none'}. Change the "
                "layers of the plain model and give it hyper-connections afterwards, or take layers from a model with "
                "the same options."
            )
    check_distinct([layer for layer in layers if layer is not None])
    end = min(len(layers), config.num_hidden_layers) - 1
    if _misses_the_norm(layers, first, last, config):
        raise ValueError(
            f"readout {options.readout!r} follows the final norm of the model, so layers with streams must run up to "
            f"the last one, {end}; got streams in {first} to {last}. Put plain layers in front of them alone and leave "
            "early behind the first of them, or use readout='mean'."
        )
    _check_end(layers, "expand_hc", first, options.stream_embedding)
    _check_end(layers, "readout_hc", min(last, max(first, end)), READOUTS[options.readout].module is not None)


def _misses_the_norm(layers: Any, first: int, last: int, config: Any) -> bool:
    """Whether what reaches the final norm are no streams, though they are to be joined behind it."""
    end = min(len(layers), config.num_hidden_layers) - 1
    return last >= 0 and not first <= end <= last and layers[last].reads_out_after_norm()


def _check_end(layers: Layers, name: str, home: int, learned: bool) -> None:
    for position, layer in enumerate(layers):
        wanted = learned and position == home
        if layer is not None and (layer.end(name) is not None) != wanted:
            raise ValueError(
                f"layer {home} of {len(layers)}, at one end of the streams, must have the learned {name!r} and no "
                f"other layer may; layer {position} has {'none' if wanted else 'one'}. Hand the module over and set it "
                "to None in the other layers, or use options without learned ends: readout='mean', "
                "stream_embedding=False."
            )


def check_complete(layers: Any, config: Any, candidates: tuple[LayerSpec, ...]) -> None:
    """Refuses to save layers that its configuration would not make again.

    Args:
        layers: the list of the decoder layers, which may be wrapped one by one.
        config: of the model that they are in.
        candidates: what its family says that each of them may look like.

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
    # Whether a row was written or read makes no difference.
    made = {replace(layer.spec, derived=False) for layer in found if layer is not None}
    if not made <= {replace(spec, derived=False) for spec in candidates}:
        raise ValueError(
            f"a model must be saved while the row holds that its hyper-connections were made by; another one has been "
            f"registered for {config.model_type!r} since. Register that row again, or remove the hyper-connections and "
            "apply them anew."
        )
    options, (first, last) = config.stream_options(), stretch(found)
    own = None if found[first] is None else found[first].hc_options  # type: ignore[union-attr]
    if own is None or replace(own, layers=options.layers) != options:
        raise ValueError(
            f"the layers of a model must be saved with the options of its configuration, {options}; got {own}. Make "
            "the configuration agree with the layers."
        )
    if (first, last + 1) != (options.layers or (0, len(layers))):
        raise ValueError(
            f"the layers with hyper-connections must be saved under their present numbers; the configuration says "
            f"hc_layers={options.layers}, and they are {first} to {last} of {len(layers)}. Set config.hc_layers = "
            f"({first}, {last + 1})."
        )
