# Code of kromhc-hf, which travels with every model that it saves.
"""The source of a decoder layer's forward, and which way its conditions go for a live layer."""

import ast
import functools
import inspect
import textwrap
from typing import Any

from torch import nn

from .host import written
from .layer_spec import attribute


@functools.cache
def forward_source(layer_class: Any) -> ast.FunctionDef:
    """The forward of a class as it is written.

    Raises:
        ValueError: if its source is not there.
    """
    try:
        tree: Any = ast.parse(textwrap.dedent(inspect.getsource(written(layer_class.forward))))
    except (OSError, TypeError):
        raise ValueError(
            f"the source of {layer_class.__name__}.forward must be installed, where what it does and returns is read; "
            "got none. Install its package from a wheel that has the source."
        ) from None
    return tree.body[0]


def own_path(node: ast.AST) -> str | None:
    """`self.a.b` -> "a.b"."""
    text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
    plain = text.startswith("self.") and all(part.isidentifier() for part in text.split("."))
    return text.removeprefix("self.") if plain else None


def evaluated(test: ast.expr, layer: nn.Module) -> bool | None:
    """Which way a condition on attributes of a live layer goes; None if it is on anything else."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = evaluated(test.operand, layer)
        return None if inner is None else not inner
    if isinstance(test, ast.BoolOp):
        parts = [evaluated(value, layer) for value in test.values]
        if None not in parts:
            return all(parts) if isinstance(test.op, ast.And) else any(parts)
    path = own_path(test)
    if path is not None and path != "training":
        found = attribute(layer, path)
        return bool(found) if isinstance(found, bool | int | str | None) else None
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.comparators[0], ast.Constant):
        path, other = own_path(test.left), test.comparators[0].value
        found = attribute(layer, path) if path is not None else None
        if path is not None and isinstance(test.ops[0], ast.Is | ast.IsNot) and other is None:
            return (found is None) == isinstance(test.ops[0], ast.Is)
        if isinstance(found, str | int) and isinstance(test.ops[0], ast.Eq | ast.NotEq):
            return (found == other) == isinstance(test.ops[0], ast.Eq)
    return None
