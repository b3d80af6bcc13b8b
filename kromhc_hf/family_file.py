"""A row in a TOML file, in the words of `kromhc_hf.rows`: a name for each argument, an array for each tuple."""

import importlib
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from .modeling.layer_spec import LayerSpec, Sublayer, block, row_of, sequential
from .own_families import register_family


WORDS = {"sequential": sequential, "block": block}
# Whether a row was derived is not for a file to say.
OF_LAYERS = {name: kind for name, kind in get_type_hints(LayerSpec).items() if name not in ("steps", "derived")}
# As TOML calls the types of values.
NAMES = {str: "a string", bool: "true or false", int: "an integer", dict: "a table"}


def register_family_file(path: Path) -> None:
    """Registers the row that a TOML file says.

    Raises:
        ValueError: with the place in the file, what it says, and what could stand there.
    """
    try:
        tomllib: Any = importlib.import_module("tomllib")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"a TOML file needs Python 3.11 or newer to be read; got {path}. Write the row into a Python file that "
            "calls register_family."
        ) from error
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be a TOML file; {error}.") from error
    given = arguments_of({"model_type": str, "layer_class": str, "row": tuple[dict, ...]}, content, str(path))
    for name in ("model_type", "row"):
        if name not in given:
            raise ValueError(f"{path} must say {name}; it has {', '.join(content) or 'nothing'}.")
    kinds = tuple(layers_of(table, f"{path}: [[row]] {i}") for i, table in enumerate(given.pop("row"), start=1))
    register_family(row=row_of(kinds), **given)


def layers_of(table: dict[str, Any], where: str) -> LayerSpec:
    """One kind of layers: a word with its sublayers and options, or the steps one by one."""
    said = [name for name in (*WORDS, "steps") if name in table]
    if len(said) != 1:
        raise ValueError(f"{where} must have one of {', '.join(WORDS)} and steps; it has {', '.join(table)}.")
    (name,) = said
    if name == "steps":
        return _made(LayerSpec, table, where)
    word: Any = WORDS[name]
    own = {option: kind for option, kind in get_type_hints(word).items() if kind not in (Sublayer, LayerSpec, Any)}
    given = arguments_of({name: tuple[Sublayer, ...], **own, **OF_LAYERS}, table, where)
    sublayers = given.pop(name)
    if not sublayers or (word is sequential and len(sublayers) != 2):
        expected = "two, attention and feed-forward" if word is sequential else "at least one"
        raise ValueError(f"{where}.{name} must have as many sublayers as the word, {expected}; got {len(sublayers)}.")
    return word(*sublayers, **given)


def _made(word: Any, table: Any, where: str) -> Any:
    """A `LayerSpec`, `Step` or `Sublayer` from the table of its arguments."""
    kinds = {name: kind for name, kind in get_type_hints(word).items() if name != "derived"}
    given = arguments_of(kinds, table, where)
    try:
        return word(**given)
    except TypeError as error:
        raise ValueError(f"{where} must say all of a {word.__name__}; {error}.") from error


def arguments_of(kinds: dict[str, Any], table: Any, where: str) -> dict[str, Any]:
    """The values of a table, each as its type wants it."""
    if not isinstance(table, dict):
        raise ValueError(f"{where} must be a table with {', '.join(kinds)}; got {table!r}.")
    for name in table:
        if name not in kinds:
            raise ValueError(f"{where} must have no names but {', '.join(kinds)}; got {name!r}.")
    return {name: _value(kinds[name], value, f"{where}.{name}") for name, value in table.items()}


def _value(kind: Any, value: Any, where: str) -> Any:
    """A value of the file as a type of Python; an array as the tuple that it stands for."""
    if is_dataclass(kind):
        return _made(kind, value, where)
    if isinstance(kind, UnionType):
        fitting = [one for one in get_args(kind) if (get_origin(one) is tuple) == isinstance(value, list)]
        return _value((*fitting, *get_args(kind))[0], value, where)
    if get_origin(kind) is tuple and isinstance(value, list):
        parts = get_args(kind)
        parts = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        if len(parts) == len(value):
            return tuple(_value(part, one, f"{where}[{i}]") for i, (part, one) in enumerate(zip(parts, value)))
    elif type(value) is kind:
        return value
    size = "" if Ellipsis in get_args(kind) else f" of {len(get_args(kind))}"
    expected = f"an array{size}" if get_origin(kind) is tuple else NAMES[kind]
    raise ValueError(f"{where} must be {expected}; got {value!r}.")
