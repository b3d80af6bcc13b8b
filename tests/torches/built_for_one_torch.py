"""A plugin of pytest that hides packages whose binaries belong to another torch than the one in front of them."""

import importlib.machinery
from typing import Any


HIDDEN = ("torchao", "bitsandbytes")
_find_spec = importlib.machinery.PathFinder.find_spec.__func__  # type: ignore[attr-defined]


def find_spec(cls: Any, name: str, path: Any = None, target: Any = None) -> Any:
    return None if name.partition(".")[0] in HIDDEN else _find_spec(cls, name, path, target)


importlib.machinery.PathFinder.find_spec = classmethod(find_spec)  # type: ignore[assignment,method-assign]
