# Code of kromhc-hf, which travels with every model that it saves.
"""From a configuration to the layer specifications of its family, and the check of a live layer against them."""

from typing import Any

import transformers
from torch import nn

from .families import COMPOSITE, REFUSED, ROWS
from .host import CACHE_NAMES, cache_name, forward_parameters
from .layer_returns import returned_beside
from .layer_spec import ByConfig, LayerSpec, attribute
from .outside_families import OutsideFamily, is_from_outside, outside_family
from .releases import has_family


def check_model_type(model_type: str) -> None:
    """Refuses a family that the table does not describe.

    Raises:
        ValueError: naming the family, and the reason or the way to the supported ones.
    """
    if is_from_outside(model_type):
        return
    if model_type in REFUSED:
        raise ValueError(
            f"model_type {model_type!r} is not supported: {REFUSED[model_type]}. "
            "Use a supported family; `kromhc families` lists them."
        )
    if model_type not in ROWS and model_type not in COMPOSITE:
        raise ValueError(
            f"model_type must be one of the supported families; got {model_type!r}. Use one of them, which "
            "`kromhc families` lists; or say what its layers look like with register_family (--family FILE), or have "
            "it read from their source with derive_family (--derive)."
        )
    if not has_family(model_type):
        raise ValueError(
            f"model_type {model_type!r} needs a transformers that has it; got {transformers.__version__}, which does "
            "not. Install a newer one, for a saved model the transformers_version that its config.json names."
        )


def check_family(config: Any, model_type: str) -> None:
    """Refuses the configuration of a family that no row describes, see `check_model_type`."""
    if outside_family(config, model_type) is None:
        check_model_type(model_type)


def layer_specs(config: Any, model_type: str) -> tuple[LayerSpec, ...]:
    """The layer specifications of a family for this configuration; each layer follows the first one that it fits.

    Args:
        config: of the text model.
        model_type: its model type without hyper-connections.

    Raises:
        ValueError: if the family, or the family with this configuration, is not supported.
    """
    check_family(config, model_type)
    if getattr(config, "add_cross_attention", False):
        raise ValueError(
            f"{model_type} must be a decoder without cross-attention; got add_cross_attention=True. "
            "Cross-attention layers have no hyper-connection; load the model with add_cross_attention=False."
        )
    if getattr(config, "layerdrop", 0):
        raise ValueError(
            f"{model_type} must have layerdrop=0; got {config.layerdrop}: the last layer reads the streams out and "
            "cannot be dropped. Set config.layerdrop = 0."
        )
    outside = outside_family(config, model_type)
    row = ROWS[model_type] if outside is None else outside.row
    specs = row.choose(config) if isinstance(row, ByConfig) else row
    return (specs,) if isinstance(specs, LayerSpec) else specs


def fit_layer(
    layer: nn.Module, specs: tuple[LayerSpec, ...], position: int, outside: OutsideFamily | None = None
) -> LayerSpec:
    """The first specification that a live decoder layer fits, so that nothing is changed that is not understood.

    Args:
        layer: the decoder layer.
        specs: what it may look like.
        position: where it stands.
        outside: its family, if the code of that is not in transformers.

    Raises:
        ValueError: naming the layer, the attribute and what was expected.
    """
    label = f"layer {position} ({type(layer).__name__})"
    _check_origin(layer, label, outside)
    check_own_forward(layer, position)
    layer_class: Any = type(layer)
    problems = []
    for spec in specs:
        problem = _misfit(layer, spec)
        if problem is None:
            _check_returned(layer, layer_class, spec, label)
            return spec
        problems.append(problem)
    raise ValueError(f"{label} {'; or else it '.join(problems)}.")


def _check_origin(layer: nn.Module, label: str, outside: OutsideFamily | None) -> None:
    """Refuses a layer of a class that the row was not written for.

    Raises:
        ValueError: naming the class and the way out.
    """
    defined = f"its class is defined in {type(layer).__module__}, where forward may differ from the one that the"
    if outside is None and not type(layer).__module__.startswith("transformers."):
        raise ValueError(
            f"{label} must be a decoder layer of transformers; {defined} table of families describes. Load the native "
            "class, or give the model a model_type of its own and a row with register_family."
        )
    if outside is not None and outside.layer_class not in (None, type(layer).__name__):
        raise ValueError(
            f"{label} must be a {outside.layer_class}; {defined} row of {outside.model_type!r} describes. Remove the "
            "wrapper, or register the family with this layer_class."
        )


def _check_returned(layer: nn.Module, layer_class: Any, spec: LayerSpec, label: str) -> None:
    """Refuses a layer that returns what no module of its row does.

    Raises:
        ValueError: naming the module.
    """
    run = {name for sublayer in spec.sublayers for name in sublayer.modules}
    for beside in returned_beside(layer, layer_class) or ():
        if beside.module is not None and beside.module not in run:
            raise ValueError(
                f"{label} must return behind its hidden states what a module of its row returned; got what "
                f"{beside.module!r} did. Name it in the row."
            )


def check_own_forward(module: nn.Module, position: int | None = None) -> None:
    """Refuses a layer, or the model around the layers, whose forward is not its class's.

    A change of class would not reach it.

    Args:
        module: the layer or the model.
        position: of the layer.

    Raises:
        ValueError: naming the layer and the way out.
    """
    if "forward" in vars(module):
        what = "the model around the layers" if position is None else f"layer {position}"
        raise ValueError(
            f"{what} ({type(module).__name__}) must have its class's own forward; an instance-level forward "
            "is in the way (device_map offloading or a wrapper). Change the model before dispatching it."
        )


def _misfit(layer: nn.Module, spec: LayerSpec) -> str | None:
    """What keeps a layer from being what the specification says, None if nothing does."""
    if spec.layer_class not in (None, type(layer).__name__):
        return f"must be a {spec.layer_class}"
    for name in spec.names:
        if hasattr(layer, name):
            return f"must not have an attribute {name!r} yet; got {getattr(layer, name)!r}"
    for sublayer in spec.sublayers:
        for name in (*sublayer.modules, *filter(None, (sublayer.pre,))):
            value = attribute(layer, name)
            if not callable(value) and not (name in sublayer.modules[1:] and _is_number(value)):
                return f"must have a module {name!r}; got {value!r}"
        for _, name in sublayer.renames:
            if name not in forward_parameters(attribute(layer, sublayer.modules[0]))[0]:
                return f"must have a module {sublayer.modules[0]!r} whose forward takes {name!r}"
        # What every attention of transformers says of itself.
        if sublayer.recurrent and hasattr(attribute(layer, sublayer.modules[0]), "is_causal"):
            return f"must have a module {sublayer.modules[0]!r} that is no attention"
        if sublayer.times is not None and sublayer.times not in forward_parameters(layer)[0]:
            return f"must have a forward that takes {sublayer.times!r}"
    if (problem := _misled_cache(layer, spec)) is not None:
        return problem
    for name in _post(spec):
        if not callable(attribute(layer, name)) and not _is_number(attribute(layer, name)):
            return f"must have a module or a dropout probability {name!r}; got {attribute(layer, name)!r}"
    for name in _factors(spec):
        if not _is_number(attribute(layer, name)) and not hasattr(attribute(layer, name), "shape"):
            return f"must have a factor {name!r}; got {attribute(layer, name)!r}"
    known = _known_attributes(spec)
    for name in _attributes_with_weights(layer):
        if name not in known:
            return f"must have no weights beyond those that its row names; got {name!r}"
    return None


def _misled_cache(layer: nn.Module, spec: LayerSpec) -> str | None:
    """What keeps the cache that a layer takes from its sublayers, which would then generate other tokens in silence."""
    if cache_name(forward_parameters(layer)[0]) is None:
        return None
    takers = [sublayer for sublayer in spec.sublayers if sublayer.attention]
    names = [name for sublayer in takers or spec.sublayers for name in sublayer.modules]
    parameters = {
        name: forward_parameters(attribute(layer, name)) for name in names if not _is_number(attribute(layer, name))
    }
    if not takers:
        open_ = [name for name, (named, others) in parameters.items() if others or len(named) > 1]
        return f"must have a module {open_[0]!r} that takes hidden states alone" if open_ else None
    reached = any(cache_name(named) is not None for named, _ in parameters.values())
    if any(sublayer.own_state for sublayer in takers):
        return (
            f"must have a module {names[0]!r} that keeps its state itself; this one takes a cache" if reached else None
        )
    expected = f"must have a module {' or '.join(map(repr, names))} that takes its cache, as {', '.join(CACHE_NAMES)}"
    return None if reached else expected


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _post(spec: LayerSpec) -> list[str]:
    sublayers = [name for sublayer in spec.sublayers for name in sublayer.post]
    return sublayers + [name for step in spec.steps for name in step.post]


def _factors(spec: LayerSpec) -> list[str]:
    factors = [name for sublayer in spec.sublayers for name in (sublayer.scale, sublayer.input_scale)]
    return [name for name in (*factors, *(step.scale for step in spec.steps), spec.gain) if name is not None]


def _known_attributes(spec: LayerSpec) -> set[str]:
    paths = [*_factors(spec), *_post(spec)]
    for sublayer in spec.sublayers:
        paths += [*sublayer.modules, *filter(None, (sublayer.pre,))]
    return {path.split(".")[0] for path in paths}


def _attributes_with_weights(layer: nn.Module) -> list[str]:
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    return [name.split(".")[0] for name, _ in tensors]
