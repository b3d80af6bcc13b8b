# Code of kromhc-hf, which travels with every model that it saves.
"""What a model does to the hidden states between its decoder layers, read from the source of its forward.

Between the layers the hidden states are streams, `[B, S, n, C]`. A model that hands them from layer to layer is safe.
Some models of several modalities add image features there, in a method such as `_deepstack_process`; those go to every
stream. Some go on with a part of the tokens, which is the same for streams. Whatever else changes them is refused.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .host import written


class LayerLoop(NamedTuple):
    """One loop over layers in the forward of a model.

    Args:
        layers: path from the model to the layers, such as "layers".
        methods: of the model, by which it adds to the hidden states.
        unclear: the first statement that changes them in another way, None if there is none.
    """

    layers: str
    methods: tuple[str, ...]
    unclear: str | None


@functools.cache
def layer_loops(model_class: Any) -> tuple[LayerLoop, ...]:
    """The loops over layers in the forward of a model class of transformers; none where its source cannot be read."""
    forward = _definition(model_class.forward)
    loops = [node for node in ast.walk(forward) if isinstance(node, ast.For)] if forward else []
    return tuple(_read_loop(model_class, loop, path) for loop in loops for path in _looped_over(loop.iter))


def check_between_layers(model: Any, path: str) -> None:
    """Refuses a model that does to the hidden states, between its layers, what is not understood for streams.

    Args:
        model: the one that holds the layers, with hyper-connections or without.
        path: from it to them.

    Raises:
        ValueError: naming the statement.
    """
    model_class: Any = getattr(type(model), "backbone_class", type(model))
    loops = [loop for loop in layer_loops(model_class) if loop.layers == path]
    unclear = next((loop.unclear for loop in loops if loop.unclear), None)
    if not loops or unclear:
        found = f"`{unclear}`" if unclear else f"no loop over self.{path} that can be read"
        raise ValueError(
            f"{model_class.__name__} must hand the hidden states from layer to layer, or add features to them in a "
            f"method of its own, which then goes to every stream; got {found} in its forward. Use a model of another "
            "family; `kromhc families` lists them."
        )


def methods_for_streams(model_class: Any) -> dict[str, Callable[..., Any]]:
    """The methods of a model class that add to the hidden states between layers, each made to add to every stream."""
    names = (name for loop in layer_loops(model_class) for name in loop.methods)
    return {name: _on_every_stream(getattr(model_class, name)) for name in names}


def _on_every_stream(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(method)
    def add(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if hidden_states.dim() == 3:  # behind the last layer, and without hyper-connections
            return method(self, hidden_states, *args, **kwargs)
        # One by one: features [K, C] would broadcast over [K, n, C] along the wrong axis, in silence where K = n.
        return torch.stack([method(self, stream, *args, **kwargs) for stream in hidden_states.unbind(2)], 2)

    return add


def _definition(method: Any) -> ast.FunctionDef | None:
    """A method that takes a tensor, as it is written; None where that cannot be read."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(written(method))))
    except (OSError, TypeError):
        return None
    found = next((node for node in tree.body if isinstance(node, ast.FunctionDef)), None)
    return found if found is not None and len(found.args.args) > 1 else None


def _looped_over(node: ast.expr) -> Iterator[str]:
    """The attributes of the model in `self.layers`, `self.layers[:n]`, `enumerate(self.layers)`, `zip(self.layers)`."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("enumerate", "zip"):
        for argument in node.args:
            yield from _looped_over(argument)
    elif isinstance(node, ast.Subscript):
        yield from _looped_over(node.value)
    elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("self."):
        yield ast.unparse(node).removeprefix("self.")


def _read_loop(model_class: Any, loop: ast.For, path: str) -> LayerLoop:
    variables = {node.id for node in ast.walk(loop.target) if isinstance(node, ast.Name)}

    def is_layer_call(node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in variables

    nodes = [node for statement in loop.body for node in ast.walk(statement)]
    calls: list[Any] = [node for node in nodes if is_layer_call(node)]
    passed = [[*call.args, *(k.value for k in call.keywords if k.arg == "hidden_states")][:1] for call in calls]
    names = {argument[0].id for argument in passed if argument and isinstance(argument[0], ast.Name)}
    if len(names) != 1 or not all(passed):
        return LayerLoop(path, (), ast.unparse(loop).splitlines()[0])
    hidden, returned, methods = names.pop(), set[str](), list[str]()

    def is_returned(node: Any) -> bool:
        """Whether it is what a layer returned, or its first part."""
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and node.slice.value == 0:
            node = node.value
        return is_layer_call(node) or (isinstance(node, ast.Name) and node.id in returned)

    def is_understood(value: Any) -> bool:
        if isinstance(value, ast.IfExp):
            return is_understood(value.body) and is_understood(value.orelse)
        name = _method_on(value, {hidden, *returned})
        definition = None if name is None else _definition(getattr(model_class, name, None))
        if name is not None and definition is not None and _only_adds(definition):
            methods.append(name)
            return True
        return is_returned(value) or (definition is not None and _only_selects(definition))

    for node in nodes:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        written = [part for target in targets if target is not None for part in _written(target)]
        if isinstance(node, ast.Assign) and is_returned(node.value):
            returned |= {name for name, whole in written[:1] if whole}
        # What a layer returns beside them comes behind the hidden states.
        first = bool(written) and written[0] == (hidden, True)
        if (hidden in {name for name, _ in written} or _changes_in_place(node, hidden)) and not (
            isinstance(node, ast.Assign) and first and is_understood(node.value)
        ):
            return LayerLoop(path, (), ast.unparse(node).splitlines()[0])
    return LayerLoop(path, tuple(dict.fromkeys(methods)), None)


def _written(target: ast.AST) -> Iterator[tuple[str, bool]]:
    """The variables that an assignment writes to, and whether as a whole."""
    if isinstance(target, ast.Tuple | ast.List):
        for part in target.elts:
            yield from _written(part)
    elif isinstance(target, ast.Name):
        yield target.id, True
    elif isinstance(target, ast.Subscript | ast.Attribute | ast.Starred):
        yield from ((name, False) for name, _ in _written(target.value))


def _changes_in_place(node: ast.AST, hidden: str) -> bool:
    """Whether it is a call like `hidden_states.add_(x)` or `hidden_states[mask].add_(x)`."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    method = node.func.attr
    changed = {name for name, _ in _written(node.func.value)}
    return method.endswith("_") and not method.endswith("__") and hidden in changed


def _method_on(value: ast.AST, hidden: set[str]) -> str | None:
    """The name of the method in `self.method(hidden_states, ...)`."""
    if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Attribute) or not value.args:
        return None
    first, owner = value.args[0], value.func.value
    is_own = isinstance(owner, ast.Name) and owner.id == "self"
    return value.func.attr if is_own and isinstance(first, ast.Name) and first.id in hidden else None


def _is_about(node: ast.AST) -> bool:
    """Whether it reads of a tensor what streams have as well, such as its dtype or the number of its tokens."""
    return isinstance(node, ast.Attribute) and node.attr in ("device", "dtype", "shape")


def _only_selects(definition: ast.FunctionDef) -> bool:
    """Whether a method returns its first argument after `self`, or tokens of it, `hidden_states[:, chosen]`."""
    hidden, allowed = definition.args.args[1].arg, list[ast.AST]()
    for node in ast.walk(definition):
        if _is_about(node):
            allowed.append(node.value)  # type: ignore[attr-defined]
        elif isinstance(node, ast.Return):
            allowed.append(node.value.elts[0] if isinstance(node.value, ast.Tuple) else node.value or node)
        elif isinstance(node, ast.Assign) and (hidden, True) in [w for t in node.targets for w in _written(t)]:
            value = node.value
            index = value.slice.elts if isinstance(value, ast.Subscript) and isinstance(value.slice, ast.Tuple) else []
            if len(node.targets) != 1 or not isinstance(node.targets[0], ast.Name) or len(index) < 2:
                return False
            if any(ast.unparse(part) != ":" for part in (index[0], *index[2:])):
                return False
            allowed += [value.value, node.targets[0]]  # type: ignore[attr-defined]
    names = [node for node in ast.walk(definition) if isinstance(node, ast.Name) and node.id == hidden]
    return all(node in allowed for node in names)


def _only_adds(definition: ast.FunctionDef) -> bool:
    """Whether a method returns its first argument after `self` with something added to it, or to some of its tokens."""
    hidden, sums = definition.args.args[1].arg, dict[str, str]()

    def part(node: Any) -> str | None:
        """Which part of the hidden states it is: all of them "", or the index; None if it is none."""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "clone":
            return part(node.func.value)
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == hidden:
            return ast.dump(node.slice)
        return "" if isinstance(node, ast.Name) and node.id == hidden else None

    def reads(node: ast.AST) -> bool:
        """Whether the values of the hidden states go into it."""
        if _is_about(node):
            return False
        return (isinstance(node, ast.Name) and node.id in {hidden, *sums}) or any(
            map(reads, ast.iter_child_nodes(node))
        )

    def summed(node: Any) -> str | None:
        """The part of the hidden states that it is a sum of, with something else."""
        if isinstance(node, ast.Name):
            return sums.get(node.id)
        if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Add):
            return None
        sides = ((node.left, node.right), (node.right, node.left))
        return next((part(one) for one, other in sides if part(one) is not None and not reads(other)), None)

    for statement in definition.body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue
        if isinstance(statement, ast.Return):
            return part(statement.value) == "" or summed(statement.value) == ""
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            return False
        target, value = statement.targets[0], statement.value
        if isinstance(target, ast.Name) and target.id != hidden:
            found = summed(value)
            if found is None and reads(value):
                return False
            sums |= {target.id: found} if found is not None else {}
        elif part(target) is None or (summed(value) != part(target) and (part(value) != "" or part(target) != "")):
            return False
    return False
