"""A row that somebody wrote, held against what can be read from the source of the layers."""

from dataclasses import replace
from typing import Any

from .families_table import describe
from .modeling.connection_plan import ConnectionPlan
from .modeling.layer_spec import LayerSpec, Step, Sublayer
from .modeling.model_types import PREFIX
from .modeling.outside_families import outside_family
from .row_reading import read_row


def check_against_source(plan: ConnectionPlan) -> None:
    """Refuses the row of a family from outside that says something else than the source of a layer plainly does.

    A row may fit the modules of a layer and yet say them in another order, or leave out one without weights. What
    cannot be read is taken as the row says it.

    Raises:
        ValueError: with the layer, what its row says, and what its source says.
    """
    config = plan.decoder.owners[-1].config
    if outside_family(config, config.model_type.removeprefix(PREFIX)) is None:
        return  # the tests hold the rows of the table against the models themselves
    for position, (layer, spec) in enumerate(zip(plan.decoder.layers, plan.specs)):
        if spec.derived:
            continue
        try:
            read = read_row(layer)
        except ValueError:
            continue
        if without_names(read) != without_names(spec):
            layer_class: Any = getattr(layer, "layer_class", type(layer))
            raise ValueError(
                f"layer {position} ({layer_class.__name__}) must be what its row says, {describe(spec)}; the source of "
                f"its forward says {describe(read)}. Change the row, which may say the layer_class of each of several "
                "kinds, or have it read from the source with derive_family."
            )


def without_names(spec: LayerSpec) -> tuple[Any, ...]:
    """What a layer computes by a specification, in one form for all ways to write it down."""
    return spec.gain, tuple(map(_step, spec.steps))


def _step(step: Step) -> Any:
    chains = [_chain(sublayer) for sublayer in step.sublayers]
    if len(chains) > 1:
        return step.post, step.scale, frozenset(chains)
    (only,) = chains
    scale = only.scale if step.scale is None else step.scale
    return (), None, frozenset({replace(only, module=(*only.modules, *step.post), scale=scale)})


def _chain(sublayer: Sublayer) -> Sublayer:
    """With all modules in the order in which they run, and nothing about the arguments that they are given."""
    modules = (*filter(None, (sublayer.pre,)), *sublayer.modules, *sublayer.post)
    plain: dict[str, Any] = {"attention": False, "recurrent": False, "own_state": False, "renames": (), "cast": False}
    return replace(sublayer, module=modules, pre=None, post=(), **plain)
