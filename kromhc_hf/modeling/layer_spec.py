# Code of kromhc-hf, which travels with every model that it saves.
"""The words in which decoder layers are described: sublayers, residual steps, layers; names, no mathematics."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any


# Beside the hyper-connections, where the streams begin and end in a learned way: on the first and on the last layer.
END_NAMES = ("expand_hc", "readout_hc")


@dataclass(frozen=True)
class Sublayer:
    """One call inside a residual branch: `output = scale * post(times * module(input_scale * pre(input)))`.

    All names are attributes of the layer and may be dotted. In `module` and `post`, an attribute that is a number is
    the probability of a functional dropout.

    Args:
        module: attribute of the sublayer; several names are applied one after the other.
        pre: attribute of the norm in front, if any.
        post: attributes applied to the output in order.
        scale: attribute with a factor on the output.
        input_scale: attribute with a factor on the normed input.
        times: argument of the layer that the output of the module is multiplied with, before `post`.
        attention: whether the modules take the arguments of the layer, such as mask and cache.
        recurrent: whether the modules, of those arguments, take only what their forward names.
        own_state: whether the modules keep their state themselves, and so are given no cache.
        renames: pairs of an argument of the layer and the name under which the modules take it; not for the cache,
            which is known by any name.
        repeat: how many times the input is passed, for attention with query, key and value of its own.
        cast: whether the input is cast to the dtype of `pre` first.
        zero: name of a `residual` argument that the sublayer would add inside; it is given a zero.
        bias: position, in what the module returns, of a bias that the layer adds to the output.
    """

    module: str | tuple[str, ...]
    pre: str | None = None
    post: tuple[str, ...] = ()
    scale: str | None = None
    input_scale: str | None = None
    times: str | None = None
    attention: bool = False
    recurrent: bool = False
    own_state: bool = False
    renames: tuple[tuple[str, str], ...] = ()
    repeat: int = 1
    cast: bool = False
    zero: str | None = None
    bias: int | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        return (self.module,) if isinstance(self.module, str) else self.module


@dataclass(frozen=True)
class Step:
    """One residual step, `residual + scale * post(sum of the sublayers)`, with one hyper-connection.

    Args:
        name: attribute that the hyper-connection gets; ends in `_hc`, by which it is known in files and adapters.
        sublayers: what runs on the same branch input, side by side.
        post: attributes applied to the sum in order; a number is the probability of a functional dropout.
        scale: attribute with a factor on the sum.
    """

    name: str
    sublayers: tuple[Sublayer, ...]
    post: tuple[str, ...] = ()
    scale: str | None = None

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or not self.name.endswith("_hc") or self.name in END_NAMES:
            raise ValueError(
                f"the name of a step must be one that ends in '_hc', and none of {', '.join(END_NAMES)}; got "
                f"{self.name!r}. Use for example 'attn_hc'."
            )
        if not self.sublayers:
            raise ValueError(f"a step must have at least one sublayer; {self.name!r} has none.")


@dataclass(frozen=True)
class LayerSpec:
    """One kind of decoder layer.

    Args:
        steps: the residual steps in order.
        layers: path from the base model to the list of layers.
        gain: attribute with a factor on the whole residual at the end of the layer.
        wide: attribute that tells whether the residual is kept in fp32.
        exact: False where the family adds parallel branches to the residual in another order, so that a converted
            model is equal up to the rounding of that sum; all others are bitwise equal.
        layer_class: the name of the class of such layers, where those of another class have modules by the same names.
        derived: whether it was read from the source of the layer, and not written by somebody.
    """

    steps: tuple[Step, ...]
    layers: str = "layers"
    gain: str | None = None
    wide: str | None = None
    exact: bool = True
    layer_class: str | None = None
    derived: bool = False

    def __post_init__(self) -> None:
        if not self.steps or len(set(self.names)) < len(self.steps):
            raise ValueError(
                f"a layer must have at least one step, and each a name of its own; got {', '.join(self.names) or ()}."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Attribute names of the hyper-connections, one per step."""
        return tuple(step.name for step in self.steps)

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        return tuple(sublayer for step in self.steps for sublayer in step.sublayers)


@dataclass(frozen=True)
class ByConfig:
    """A family whose layers depend on the configuration.

    Args:
        choose: the specification for a configuration; raises ValueError where there is none.
        variants: everything that `choose` may return.
    """

    choose: Callable[[Any], LayerSpec]
    variants: tuple[LayerSpec, ...]


Row = LayerSpec | tuple[LayerSpec, ...] | ByConfig


def row_of(kinds: tuple[LayerSpec, ...]) -> Row:
    """The row of a family with these kinds of layers: one as it is, several as they are tried."""
    return kinds[0] if len(kinds) == 1 else kinds


def layer_kinds(row: Row) -> tuple[LayerSpec, ...]:
    """All kinds of layers that models of a family may have."""
    if isinstance(row, ByConfig):
        return row.variants
    return (row,) if isinstance(row, LayerSpec) else row


def sequential(attention: Sublayer, feed_forward: Sublayer, scale: str | None = None, **options: Any) -> LayerSpec:
    """Attention, then feed-forward, each with a residual connection of its own."""
    attention = replace(attention, attention=True)
    return LayerSpec(
        (Step("attn_hc", (attention,), scale=scale), Step("ffn_hc", (feed_forward,), scale=scale)), **options
    )


def block(*sublayers: Sublayer, post: tuple[str, ...] = (), **options: Any) -> LayerSpec:
    """One residual connection around everything; several sublayers are parallel."""
    first = replace(sublayers[0], attention=True)
    return LayerSpec((Step("block_hc", (first, *sublayers[1:]), post=post),), **options)


def recurrent(module: str, pre: str | None = None, **options: Any) -> Sublayer:
    """A linear-attention, mamba or convolution sublayer."""
    return Sublayer(module, pre, attention=True, recurrent=True, **options)


def attribute(module: Any, path: str) -> Any:
    """The attribute at a dotted path, or None if it does not exist."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module
