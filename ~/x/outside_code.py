# Code of kromhc-hf, which travels with every model that it saves.
"""The code of a family from outside beside a saved model: the base's own files, and one that joins them with ours.

The joining file holds the row and imports the base's classes. Where kromhc-hf is installed, that computes; where it is
not, the copies in the folder do. It runs only for those who pass `trust_remote_code=True`.
"""

import ast
import inspect
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from .layer_spec import ByConfig, LayerSpec, Step, Sublayer
from .outside_families import BOUND, BoundFamily


# The file that joins the two.
FAMILY_MODULE = "kromhc_family"
# How a row that was read from the source says so there.
DERIVED = "derived=True"

TEMPLATE = '''{marker}
"""The row of {model_type!r}, whose own code is not in transformers; written when the model beside it was saved."""

from typing import TYPE_CHECKING

try:
    # The installed package goes first, so that its functions know the model.
    from kromhc_hf.modeling.layer_spec import LayerSpec, Step, Sublayer
    from kromhc_hf.modeling.modeling_kromhc import family_in_folder
    from kromhc_hf.modeling.outside_families import OutsideFamily
except ImportError:
    {here} .layer_spec import LayerSpec, Step, Sublayer
    {here} .modeling_kromhc import family_in_folder
    {here} .outside_families import OutsideFamily

{imports}


# What early releases of transformers take along, from a folder, is what this file names.
if TYPE_CHECKING:
    {names}

FAMILY = OutsideFamily(
    {model_type!r},
    {row},
    {layer_class!r},
)
CLASSES = family_in_folder(FAMILY, {config_class}, {{{models}}})
'''


def bound_family(config: Any) -> BoundFamily | None:
    """The family from outside that the class of a configuration with hyper-connections was made for."""
    return BOUND.get(type(config).backbone_config_class)


def family_files(bound: BoundFamily) -> dict[str, bytes] | None:
    """The base's own code files by name; none where it is imported from a package, None where neither can be done."""
    modules = {cls.__module__ for cls in (bound.config_class, *bound.models.values())}
    if all(name.startswith("transformers.") for name in modules):
        return {}
    files = {file for name in modules if (file := getattr(sys.modules.get(name), "__file__", None))}
    if "__main__" in modules or len(files) < len(modules):
        return None
    needed = {Path(path) for file in files for path in (file, *get_relative_import_files(file))}
    # From a repository, transformers makes a folder of copies for each file that `auto_map` names.
    contents = {(path.name, path.read_bytes()) for path in needed}
    if len(dict(contents)) == len(contents) and all(map(_is_flat, needed)):
        return dict(sorted(contents))
    return None if any(name.startswith("transformers_modules.") for name in modules) else {}


def joining_file(
    config: Any, bound: BoundFamily, marker: str, own_names: list[str], class_names: dict[str, str]
) -> str:
    """The text of the file that joins the base's classes with ours.

    Args:
        config: of the model that is saved; a row that depends on the configuration is written as it is for this one.
        bound: the family.
        marker: its first line.
        own_names: the modules of this package that lie beside it.
        class_names: of the classes with hyper-connections, by Auto class.
    """
    files = family_files(bound) or {}
    carried, beside = bool(files), [*own_names, *(name.removesuffix(".py") for name in files)]
    row = bound.family.row
    chosen: Any = row.choose(config) if isinstance(row, ByConfig) else row
    imports = [
        f"from {'.' + cls.__module__.rpartition('.')[2] if carried else cls.__module__} import {cls.__name__}"
        for cls in dict.fromkeys((bound.config_class, *bound.models.values()))
    ]
    text = TEMPLATE.format(
        marker=marker,
        here="from",  # spelled out, it would be taken for an import of this file
        model_type=bound.family.model_type,
        imports="\n".join(imports),
        names="\n    ".join(f"from .{name} import __doc__  # noqa: F401" for name in beside),
        row=_spelled(chosen),
        layer_class=bound.family.layer_class,
        config_class=bound.config_class.__name__,
        models=", ".join(f"{name!r}: {cls.__name__}" for name, cls in bound.models.items()),
    )
    return text + "".join(f'{name} = CLASSES["{auto}"]\n' for auto, name in class_names.items())


def _spelled(value: Any) -> str:
    """A part of a row as Python, without what it has by default."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_spelled, value))}{',' * (len(value) == 1)})"
    if not isinstance(value, LayerSpec | Step | Sublayer):
        return repr(value)
    given = ((field, getattr(value, field.name)) for field in fields(value))
    parts = [f"{field.name}={_spelled(part)}" for field, part in given if part != field.default]
    return f"{type(value).__name__}({', '.join(parts)})"


def _is_flat(path: Path) -> bool:
    """Whether a file imports of its own package nothing but its neighbours, as `from .x import y`."""
    packages = {name.split(".")[0] for name, module in list(sys.modules.items()) if _file_of(module) == path}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            named = (node.module or "").split(".")
            if node.level > 1 or (node.level == 1 and (len(named) > 1 or not node.module)):
                return False
            if node.level == 0 and named[0] in packages:
                return False
        elif isinstance(node, ast.Import) and packages & {alias.name.split(".")[0] for alias in node.names}:
            return False
    return True


def _file_of(module: Any) -> Path | None:
    try:
        return Path(inspect.getfile(module))
    except (OSError, TypeError):
        return None
