"""The row of a family from outside beside hyper-connections that lie without their base: data, and no code."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

from .family_file import arguments_of, layers_of
from .modeling.families import COMPOSITE, ROWS
from .modeling.layer_fit import layer_specs
from .modeling.layer_spec import row_of
from .modeling.outside_families import backbone_config_class, is_from_outside, outside_family
from .own_families import register_family, unregister_family


def row_to_carry(config: Any) -> dict[str, Any] | None:
    """What a file says of the family of a model, by the names of a TOML file; None for a family of the table.

    Args:
        config: of the model, with hyper-connections or without; a row that depends on it is what it is for this one.
    """
    model_type = backbone_config_class(config).model_type
    family = outside_family(config, model_type)
    if family is None:
        return None
    named = {} if family.layer_class is None else {"layer_class": family.layer_class}
    return {**named, "row": [_said(kind) for kind in layer_specs(config, model_type)]}


@contextmanager
def with_carried_row(model_type: str, carried: Any, where: Any) -> Iterator[None]:
    """Registers the row that a file brings along, if there is none, and forgets it where something then fails.

    Args:
        model_type: of the base.
        carried: what `row_to_carry` gave.
        where: the file, for messages.

    Raises:
        ValueError: with the place in the file, if what it says is no row.
    """
    if carried is None or model_type in ROWS or model_type in COMPOSITE or is_from_outside(model_type):
        yield
        return
    given = arguments_of({"layer_class": str, "row": tuple[dict, ...]}, carried, str(where))
    kinds = tuple(_kind(dict(table), f"{where}: row {i}") for i, table in enumerate(given.pop("row", ()), start=1))
    register_family(model_type, row_of(kinds), **given)
    try:
        yield
    except BaseException:
        unregister_family(model_type)
        raise


def _kind(table: dict[str, Any], where: str) -> Any:
    if "__" in str(table):
        raise ValueError(f"{where} must name attributes of a layer, and none of Python's own; got {table!r}.")
    derived = table.pop("derived", False) is True
    return replace(layers_of(table, where), derived=derived)


def _said(value: Any) -> Any:
    """A part of a row without what it has by default."""
    if isinstance(value, tuple):
        return list(map(_said, value))
    if not is_dataclass(value):
        return value
    given = ((field, getattr(value, field.name)) for field in fields(value))
    return {field.name: _said(part) for field, part in given if part != field.default}
