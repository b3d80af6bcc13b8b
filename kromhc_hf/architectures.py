"""What the decoder layers of each family look like, as data: attribute names only, no mathematics.

A family is one row of `ARCHITECTURES`. A row is checked against the live layer before a model is changed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Sublayer:
    """One call inside a residual branch: `output = scale * drop(post(module(pre(input))))`.

    Args:
        module: attribute of the sublayer; several names are applied one after the other.
        pre: attribute of the norm in front, if any.
        post: attributes applied to the output in order, norms or dropout modules.
        drop: attribute with the probability of a functional dropout, may be dotted.
        scale: attribute with a factor on the output.
        attention: whether the sublayer takes the arguments of the layer, such as mask and cache.
        zero: name of a `residual` argument that the sublayer would add inside; it is given a zero.
    """

    module: str | tuple[str, ...]
    pre: str | None = None
    post: tuple[str, ...] = ()
    drop: str | None = None
    scale: str | None = None
    attention: bool = False
    zero: str | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        return (self.module,) if isinstance(self.module, str) else self.module


@dataclass(frozen=True)
class LayerSpec:
    """One family's decoder layer.

    Args:
        steps: the residual steps in order, one hyper-connection each; the sublayers of one step are parallel and
            their outputs are summed.
        returns: "tensor", or "tuple" where the layer returns `(hidden_states, attention_weights)`.
        layers: path from the base model to the list of layers.
    """

    steps: tuple[tuple[Sublayer, ...], ...]
    returns: str = "tensor"
    layers: str = "layers"

    @property
    def names(self) -> tuple[str, ...]:
        """Attribute names of the hyper-connections, one per step."""
        return ("attn_hc", "ffn_hc") if len(self.steps) == 2 else ("block_hc",)


def sequential(attention: Sublayer, feed_forward: Sublayer, **options: str) -> LayerSpec:
    """Attention, then feed-forward, each with a residual connection of its own."""
    return LayerSpec(((replace(attention, attention=True),), (feed_forward,)), **options)


def parallel(attention: Sublayer, feed_forward: Sublayer, **options: str) -> LayerSpec:
    """Attention and feed-forward side by side under one residual connection."""
    return LayerSpec(((replace(attention, attention=True), feed_forward),), **options)


LLAMA = sequential(Sublayer("self_attn", "input_layernorm"), Sublayer("mlp", "post_attention_layernorm"))
SANDWICH = sequential(
    Sublayer("self_attn", "input_layernorm", post=("post_attention_layernorm",)),
    Sublayer("mlp", "pre_feedforward_layernorm", post=("post_feedforward_layernorm",)),
)
POST_NORM = sequential(
    Sublayer("self_attn", post=("post_attention_layernorm",)), Sublayer("mlp", post=("post_feedforward_layernorm",))
)
PHI3 = sequential(
    Sublayer("self_attn", "input_layernorm", post=("resid_attn_dropout",)),
    Sublayer("mlp", "post_attention_layernorm", post=("resid_mlp_dropout",)),
)
GPT2 = sequential(Sublayer("attn", "ln_1"), Sublayer("mlp", "ln_2"), layers="h")
NEOX_ATTENTION = Sublayer("attention", "input_layernorm", post=("post_attention_dropout",))
NEOX_FEED_FORWARD = Sublayer("mlp", "post_attention_layernorm", post=("post_mlp_dropout",))


def gpt_neox(config: Any) -> LayerSpec:
    block = parallel if config.use_parallel_residual else sequential
    return block(NEOX_ATTENTION, NEOX_FEED_FORWARD)


ARCHITECTURES: dict[str, LayerSpec | Callable[[Any], LayerSpec]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "mixtral": LLAMA,
    "gemma2": SANDWICH,
    "olmo2": POST_NORM,
    "phi3": PHI3,
    "gpt2": GPT2,
    "gpt_neox": gpt_neox,
}


def supported_model_types() -> tuple[str, ...]:
    """The model types of transformers that can be given hyper-connections, in alphabetical order."""
    return tuple(sorted(ARCHITECTURES))


def check_model_type(model_type: str) -> None:
    """Refuses a family that the table does not describe.

    Raises:
        ValueError: naming the family and the supported ones.
    """
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"model_type must be one of the supported families ({', '.join(supported_model_types())}); "
            f"got {model_type!r}. Add a row for it to kromhc_hf/architectures.py, or use a supported model."
        )


def layer_spec(config: Any, model_type: str) -> LayerSpec:
    """The layer specification of a family for this configuration.

    Raises:
        ValueError: if the family, or the family with this configuration, is not supported.
    """
    check_model_type(model_type)
    if getattr(config, "add_cross_attention", False):
        raise ValueError(
            f"{model_type} must be a decoder without cross-attention; got add_cross_attention=True. "
            "Cross-attention layers have no hyper-connection; load the model with add_cross_attention=False."
        )
    row = ARCHITECTURES[model_type]
    return row if isinstance(row, LayerSpec) else row(config)


def check_layer(layer: nn.Module, spec: LayerSpec, position: int) -> None:
    """Checks a live decoder layer against its row, so that nothing is changed that is not understood.

    Raises:
        ValueError: naming the layer, the attribute and what was expected.
    """
    label = f"layer {position} ({type(layer).__name__})"
    if not type(layer).__module__.startswith("transformers."):
        raise ValueError(
            f"{label} must be a decoder layer of transformers; its class is defined in {type(layer).__module__}, "
            "where forward may differ from the one that the table of families describes. Load the native class."
        )
    if "forward" in vars(layer):
        raise ValueError(
            f"{label} must have its class's own forward; an instance-level forward is in the way "
            "(device_map offloading or a wrapper). Apply hyper-connections before dispatching the model."
        )
    for sublayer in (sublayer for step in spec.steps for sublayer in step):
        norms = (sublayer.pre,) if sublayer.pre else ()
        for name in (*sublayer.modules, *norms, *sublayer.post):
            if not callable(getattr(layer, name, None)):
                raise ValueError(f"{label} must have a module {name!r}; got {getattr(layer, name, 'no such attribute')!r}.")
        for name in filter(None, (sublayer.drop, sublayer.scale)):
            if not isinstance(attribute(layer, name), int | float):
                raise ValueError(f"{label} must have a number {name!r}; got {attribute(layer, name)!r}.")
    for name in spec.names:
        if hasattr(layer, name):
            raise ValueError(f"{label} must not have an attribute {name!r} yet; got {getattr(layer, name)!r}.")


def attribute(module: Any, path: str) -> Any:
    """The attribute at a dotted path, or None if it does not exist."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module
