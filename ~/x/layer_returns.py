# Code of kromhc-hf, which travels with every model that it saves.
"""What a decoder layer returns behind its hidden states, read from the source of its forward.

That is what its modules returned, or what it was given. Where attributes of the layer decide, the way that this layer
goes is read; where its arguments decide, all are, and which one it is shows when it runs.
"""

import ast
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from .layer_source import evaluated, forward_source, own_path
from .releases import NEWEST, OLDEST, numbered


class Beside(NamedTuple):
    """One value that a layer returns behind its hidden states.

    Args:
        module: path of the module that returned it; None for an argument of the layer, which is handed back.
        part: its position in the output of the module, or the name of the argument; None for None.
        rest: whether it is all that the module returned from that position on.
        when: arguments of the layer, and what each must be, as a truth value, for the value to be returned.
    """

    module: str | None
    part: int | str | None
    rest: bool = False
    when: tuple[tuple[str, bool], ...] = ()


Returned = tuple[Beside, ...] | None


def returned_values(
    returned: tuple[Beside, ...], outputs: Mapping[str, Any], arguments: Mapping[str, Any]
) -> Iterator[Any]:
    """What a layer returns behind its hidden states.

    Args:
        returned: see `returned_beside`.
        outputs: of the modules that returned tuples; where one did not run, None stands for what it returns.
        arguments: of the layer, by the names of its own forward.
    """
    for module, part, rest, when in returned:
        if any(bool(arguments.get(name)) is not wanted for name, wanted in when):
            continue
        if isinstance(part, int):
            output = outputs.get(str(module))
            if output is None or not rest:
                yield output[part] if output is not None and part < len(output) else None
            else:
                yield from output[part:]
        else:
            yield arguments.get(part) if part is not None else None


def returned_beside(layer: nn.Module, layer_class: Any) -> Returned:
    """What the forward of a decoder layer returns behind the hidden states, read from its source.

    Args:
        layer: the live layer, whose attributes decide.
        layer_class: its class without hyper-connections.

    Returns:
        None where it returns a tensor alone, otherwise what stands behind it in the tuple.

    Raises:
        ValueError: if it returns something else, or its source is not there.
    """
    definition = forward_source(layer_class)
    named = definition.args
    arguments = [argument.arg for argument in (*named.posonlyargs, *named.args, *named.kwonlyargs)][2:]
    try:
        return _ways(layer, definition.body, {name: Beside(None, name) for name in arguments})
    except _Unreadable as unreadable:
        native = layer_class.__module__.startswith("transformers.")
        releases = f"Use a release of transformers between {numbered(OLDEST)} and {numbered(NEWEST)}."
        raise ValueError(
            f"{layer_class.__name__}.forward must return its hidden states, alone or in front of what its modules "
            f"returned or it was given; got {str(unreadable)!r}. "
            f"{releases if native else 'Return that on every way through it.'}"
        ) from None


class _Unreadable(Exception):
    """With the return that is not understood."""


class _Output(NamedTuple):
    """All that a module returned."""

    module: str


# A tuple, with None for hidden states and whatever else is not known.
_Parts = list[Beside | None]
# What a variable holds; nothing is noted of hidden states and whatever else is not known.
_Value = Beside | _Output | _Parts
_Values = dict[str, _Value]


def _ways(layer: nn.Module, statements: list[ast.stmt], values: _Values) -> Returned:
    """What is returned behind the hidden states by statements, on all ways through them."""
    for number, statement in enumerate(statements):
        node, rest = _spelled_out(statement), statements[number + 1 :]
        if isinstance(node, ast.Return):
            return _returned(node, values)
        if isinstance(node, ast.With):
            return _ways(layer, [*node.body, *rest], values)
        if isinstance(node, ast.If) and _returns(node):
            taken = evaluated(node.test, layer)
            if taken is not None:
                return _ways(layer, [*(node.body if taken else node.orelse), *rest], values)
            one, other = (_ways(layer, [*body, *rest], values) for body in (node.body, node.orelse))
            if one == other:
                return one
            joined = [None] if one is None or other is None else _joined(node.test, values, [*one], [*other])
            if None in joined:
                raise _Unreadable("; ".join(_returns(node)) + " on a condition")
            return tuple(filter(None, joined))
        values = _behind(layer, node, values)
    raise _Unreadable("no return")


def _returns(node: ast.AST) -> list[str]:
    return [ast.unparse(part) for part in ast.walk(node) if isinstance(part, ast.Return)]


def _spelled_out(node: ast.stmt) -> ast.stmt:
    """`x = a if test else b` with a statement for each way."""
    if not isinstance(node, ast.Assign | ast.Return) or not isinstance(node.value, ast.IfExp):
        return node
    choice, fields = node.value, vars(node)
    ways: Any = [[type(node)(**{**fields, "value": value})] for value in (choice.body, choice.orelse)]
    return ast.copy_location(ast.If(choice.test, *ways), node)


def _behind(layer: nn.Module, node: ast.stmt, values: _Values) -> _Values:
    """What variables hold behind a statement that returns nothing."""

    def all_of(body: list[ast.stmt]) -> _Values:
        return functools.reduce(lambda held, part: _behind(layer, _spelled_out(part), held), body, values)

    if isinstance(node, ast.With):
        return all_of(node.body)
    if isinstance(node, ast.If):
        taken = evaluated(node.test, layer)
        if taken is not None:
            return all_of(node.body if taken else node.orelse)
        one, other = all_of(node.body), all_of(node.orelse)
        found = {name: _joined_values(node.test, values, one.get(name), other.get(name)) for name in {*one, *other}}
        return {name: value for name, value in found.items() if value is not None}
    if not isinstance(node, ast.FunctionDef) and _returns(node):
        raise _Unreadable(ast.unparse(node).splitlines()[0])
    stored = {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    held = {name: value for name, value in values.items() if name not in stored}
    for name in stored:
        if isinstance(values.get(name), list):
            held[name] = [None, None]  # still a tuple, if not assigned anew
    if isinstance(node, ast.AugAssign):
        held |= _assigned(node.target, _value(ast.BinOp(node.target, node.op, node.value), values))
    elif isinstance(node, ast.Assign) and len(node.targets) == 1:
        held |= _assigned(node.targets[0], _value(node.value, values))
    return held


def _assigned(target: ast.expr, value: _Value | None) -> _Values:
    if isinstance(target, ast.Name) and value is not None:
        return {target.id: value}
    held: _Values = {}
    for index, name in enumerate(target.elts if isinstance(target, ast.Tuple) else ()):
        if not isinstance(name, ast.Name):
            break  # behind a starred one they are counted from the end
        if (part := _part(value, index)) is not None:
            held[name.id] = part
    return held


def _joined_values(test: ast.expr, values: _Values, one: _Value | None, other: _Value | None) -> _Value | None:
    """What a variable holds behind a condition, by what it holds where that is true and where it is false."""
    if one == other:
        return one
    if isinstance(one, list) and isinstance(other, list):
        return _joined(test, values, one, other)
    return [None, None] if isinstance(one, list) or isinstance(other, list) else None


def _joined(test: ast.expr, values: _Values, one: _Parts, other: _Parts) -> _Parts:
    truth, name = True, test
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        truth, name = False, test.operand
    # What else it may be is not known when the layer runs.
    told = isinstance(name, ast.Name) and values.get(name.id) == Beside(None, name.id)
    same = next((i for i, (left, right) in enumerate(zip(one, other)) if left != right), min(len(one), len(other)))
    joined = one[:same]
    for tail, wanted in ((one[same:], truth), (other[same:], not truth)):
        condition = (ast.unparse(name), wanted)
        joined += [part._replace(when=(condition, *part.when)) if part and told else None for part in tail]
    return joined


def _fixed(parts: _Parts) -> bool:
    """Whether each has its place on every way."""
    return not any(part is not None and (part.rest or part.when) for part in parts)


def _part(value: _Value | None, index: int) -> Beside | None:
    """One part of a tuple, or of what a module returned."""
    if isinstance(value, _Output):
        return Beside(value.module, index)
    if isinstance(value, list) and _fixed(value) and -len(value) <= index < len(value):
        return value[index]
    return None


def _value(node: Any, values: _Values) -> _Value | None:
    """What an expression holds."""
    if isinstance(node, ast.Name):
        return values.get(node.id)
    if isinstance(node, ast.Constant) and node.value is None:
        return Beside(None, None)
    if isinstance(node, ast.Tuple):
        parts: _Parts = []
        for element in node.elts:
            inner = _value(getattr(element, "value", None) if isinstance(element, ast.Starred) else element, values)
            if isinstance(element, ast.Starred) and isinstance(inner, list):
                parts += inner
            else:
                parts.append(inner if isinstance(inner, Beside) and not isinstance(element, ast.Starred) else None)
        return parts
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, values), _value(node.right, values)
        return [*left, *(right if isinstance(right, list) else [None])] if isinstance(left, list) else None
    if isinstance(node, ast.Subscript):
        return _subscript(node.slice, _value(node.value, values))
    path = own_path(node.func) if isinstance(node, ast.Call) else None
    return None if path is None else _Output(path)


def _subscript(index: ast.expr, whole: _Value | None) -> _Value | None:
    start = index.lower if isinstance(index, ast.Slice) else index
    number = start.value if isinstance(start, ast.Constant) else None
    if not isinstance(number, int):
        return None
    if not isinstance(index, ast.Slice):
        return _part(whole, number)
    if not isinstance(whole, _Output | list):
        return None
    if number < 0 or index.upper is not None or index.step is not None:
        return [None, None]
    if isinstance(whole, _Output):
        return [Beside(whole.module, number, rest=True)]
    first = whole[0] if whole else None
    if first is not None and first.rest and isinstance(first.part, int) and len(whole) == 1:
        return [first._replace(part=first.part + number)]
    return whole[number:] if _fixed(whole[:number]) else [None, None]


def _returned(node: ast.Return, values: _Values) -> Returned:
    found = _value(node.value, values)
    if isinstance(found, list) and found and None not in found[1:]:
        return tuple(filter(None, found[1:]))
    if isinstance(found, list) or not isinstance(node.value, ast.Name | ast.BinOp):
        raise _Unreadable(ast.unparse(node))
    return None
