# Code of kromhc-hf, which travels with every model that it saves.
"""Families from outside: decoders whose code is not in transformers, each with the row that somebody wrote for it.

`REGISTERED` has a row by model type, and `BOUND` the classes of a family by its configuration class, once they have
been loaded. Nothing here runs code: whoever loaded the classes has decided that.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

from .families import COMPOSITE, REFUSED, ROWS
from .layer_spec import ByConfig, LayerSpec, Row, layer_kinds
from .model_types import PREFIX


@dataclass(frozen=True)
class OutsideFamily:
    """A row for a model type that the table does not have.

    Args:
        model_type: as the configuration of the base says.
        row: what its decoder layers look like.
        layer_class: the name of their class; None for any that is not a wrapper from another package.
    """

    model_type: str
    row: Row
    layer_class: str | None = None


@dataclass(frozen=True)
class BoundFamily:
    """A family from outside with its classes.

    Args:
        family: the row.
        config_class: its configuration class.
        models: its model classes, by the name of the Auto class that stands for each.
        withdrawn: whether the row holds no longer but for models that have hyper-connections by it.
    """

    family: OutsideFamily
    config_class: Any
    models: dict[str, Any]
    withdrawn: bool = False


REGISTERED: dict[str, OutsideFamily] = {}
BOUND: dict[Any, BoundFamily] = {}


def checked_family(model_type: str, row: Any, layer_class: Any = None) -> OutsideFamily:
    """A family from outside, as far as that can be seen without a model.

    Raises:
        ValueError: if the table has the model type already, or one of the values is none that a row can have.
    """
    if not isinstance(model_type, str) or not re.fullmatch(r"[A-Za-z][\w.-]*", model_type):
        raise ValueError(
            f"model_type must be a name such as 'my_llama'; got {model_type!r}. Take the one in config.json."
        )
    if model_type in ROWS or model_type in COMPOSITE:
        raise ValueError(
            f"model_type must be one that the table of families does not have; got {model_type!r}, whose native class "
            "is supported. Load that, or give the model a model_type of its own."
        )
    if model_type in REFUSED:
        raise ValueError(
            f"model_type {model_type!r} is not supported: {REFUSED[model_type]}. Code of your own needs a model_type "
            "of its own."
        )
    kinds = layer_kinds(row) if isinstance(row, ByConfig | LayerSpec | tuple) else ()
    if not kinds or not all(isinstance(kind, LayerSpec) for kind in kinds):
        raise ValueError(
            f"row must be a LayerSpec, a tuple of them or a ByConfig; got {row!r}. Make one with "
            "sequential(Sublayer('self_attn', 'input_layernorm'), Sublayer('mlp', 'post_attention_layernorm'))."
        )
    if layer_class is not None and not isinstance(layer_class, type | str):
        raise ValueError(f"layer_class must be the class of the decoder layers, or its name; got {layer_class!r}.")
    name = layer_class.__name__ if isinstance(layer_class, type) else layer_class
    return OutsideFamily(model_type, row, name)


def backbone_config_class(config: Any) -> Any:
    """The configuration class of the base, of a model with hyper-connections or without."""
    return getattr(config, "backbone_config_class", type(config))


def outside_family(config: Any, model_type: str) -> OutsideFamily | None:
    """The family from outside that a configuration is of, None if it is none."""
    own = BOUND.get(backbone_config_class(config))
    if own is not None and (hasattr(config, "backbone_config_class") or not own.withdrawn):
        return own.family
    if model_type in REGISTERED:
        return REGISTERED[model_type]
    # A saved model and its base have copies of the same classes, and the row comes with the saved one.
    return next((bound.family for bound in bound_to(model_type) if not bound.withdrawn), None)


def has_derived_row(config: Any) -> bool:
    """Whether what the layers of a model look like was read from their source, and not written by somebody."""
    family = outside_family(config, config.model_type.removeprefix(PREFIX))
    return family is not None and any(kind.derived for kind in layer_kinds(family.row))


def is_from_outside(model_type: str) -> bool:
    """Whether there is a row from outside for a model type."""
    return model_type in REGISTERED or any(not bound.withdrawn for bound in bound_to(model_type))


def bind(family: OutsideFamily, config_class: Any, models: dict[str, Any]) -> None:
    """Notes the classes of a family from outside, beside those that are known of it."""
    known = BOUND[config_class].models if config_class in BOUND else {}
    BOUND[config_class] = BoundFamily(family, config_class, {**known, **models})


def register(family: OutsideFamily) -> None:
    """Has a row hold for its model type from now on, whatever held before."""
    REGISTERED[family.model_type] = family
    for bound in bound_to(family.model_type):
        BOUND[bound.config_class] = replace(bound, family=family, withdrawn=False)


def withdraw(model_type: str) -> None:
    """Has the registered row hold no longer, but for the models that have hyper-connections by it."""
    family = REGISTERED.pop(model_type)
    for bound in bound_to(model_type):
        if bound.family == family:
            BOUND[bound.config_class] = replace(bound, withdrawn=True)


def bound_to(model_type: str) -> list[BoundFamily]:
    """All loaded copies of the classes of a family from outside, the last one first."""
    return [bound for bound in reversed(BOUND.values()) if bound.family.model_type == model_type]


def bind_model(model: Any) -> None:
    """Notes the classes of a live model, if its family is one from outside."""
    family = outside_family(model.config, model.config.model_type)
    if family is not None:
        bind(family, type(model.config), _classes_of(model))


def _classes_of(model: Any) -> dict[str, Any]:
    """The classes of a live model and its base by Auto class, and those that its configuration names beside them."""
    found: dict[str, Any] = {}
    for auto_name, reference in (getattr(model.config, "auto_map", None) or {}).items():
        name = reference.rpartition(".")[2] if isinstance(reference, str) else ""
        for cls in (type(model), type(model.base_model)):
            if cls.__name__ == name:
                found[auto_name] = cls
    if model.base_model is not model:
        found.setdefault("AutoModel", type(model.base_model))
    named = re.search(r"For[A-Z]\w*$", type(model).__name__)
    head = "ForCausalLM" if type(model).__name__.endswith("LMHeadModel") else named[0] if named else ""
    if head or model.base_model is model:
        found.setdefault(f"AutoModel{head}", type(model))
    return found
