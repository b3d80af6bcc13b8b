"""A row for a layer that nobody has described, read from the source of its forward.

The forward is followed statement by statement, knowing of each variable whether it holds the residual or what modules
have made of it. What is added to the residual is a branch, and becomes a step in the words of `layer_spec`. Anything
else is refused with its line.

It is longer than other files because it is one reader, with a rule for each kind of statement and expression.
"""

import ast
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn

from .modeling.host import cache_name, forward_parameters
from .modeling.layer_source import evaluated, forward_source, own_path
from .modeling.layer_spec import LayerSpec, Step, Sublayer, attribute


class Residual(NamedTuple):
    """The residual behind so many steps."""

    steps: int


@dataclass(frozen=True)
class Branch:
    """What modules made of the residual behind so many steps.

    Args:
        reads: behind how many steps.
        names: of the modules, in the order in which they ran.
        attention: which of them takes arguments of the layer; None if none does.
        renames: pairs of an argument of the layer and the name under which that module takes it.
        scale: attribute with a factor on the output.
    """

    reads: int
    names: tuple[str, ...]
    attention: int | None = None
    renames: tuple[tuple[str, str], ...] = ()
    scale: str | None = None


class Sum(NamedTuple):
    """Branches that are added before the residual is, and an attribute with a factor on their sum."""

    branches: tuple[Branch, ...]
    scale: str | None = None


Value = Residual | Branch | Sum | None


def read_row(layer: nn.Module, layers: str = "layers") -> LayerSpec:
    """What the forward of a decoder layer does, in the words of rows.

    Args:
        layer: a live layer, with hyper-connections or without; its attributes tell which way conditions on them go.
        layers: the path from the base model to the list of layers.

    Raises:
        ValueError: with the line that is not understood.
    """
    reader = _Reader(layer)
    reader.block(reader.definition.body)
    if not reader.steps or not reader.returned:
        reader.refuse(reader.definition, "adds no branch to its first argument and returns the sum")
    names = [
        "attn_hc" if any(branch.attention is not None for branch in step.branches) else "ffn_hc"
        for step in reader.steps
    ]
    if len(names) == 1:
        names = ["block_hc"]
    elif len(set(names)) < len(names):
        names = [f"step_{i}_hc" for i in range(len(names))]
    steps = tuple(
        Step(name, tuple(map(_sublayer, step.branches)), scale=step.scale) for name, step in zip(names, reader.steps)
    )
    return LayerSpec(steps, layers=layers, exact=reader.exact, derived=True)


def _sublayer(branch: Branch) -> Sublayer:
    at, names = branch.attention, branch.names
    if at is None:
        pre, modules = (names[0], names[1:]) if len(names) > 1 else (None, names)
        return Sublayer(modules[0] if len(modules) == 1 else modules, pre, scale=branch.scale)
    pre = names[0] if at == 1 else None
    return Sublayer(names[at], pre, post=names[at + 1 :], scale=branch.scale, attention=True, renames=branch.renames)


class _Reader:
    def __init__(self, layer: nn.Module):
        self.layer = layer
        self.layer_class: Any = getattr(layer, "layer_class", type(layer))
        self.definition = forward_source(self.layer_class)
        self.arguments = forward_parameters(self.layer_class)[0]
        self.others = self.definition.args.kwarg.arg if self.definition.args.kwarg else None
        self.values: dict[str, Value] = {self.arguments[0]: Residual(0)}
        self.tuples: dict[str, Value] = {}  # variables with a tuple, by its first part
        self.steps: list[Sum] = []
        self.exact, self.returned = True, False

    def refuse(self, node: ast.AST, what: str) -> Any:
        line = ast.unparse(node).splitlines()[0][:120]
        raise ValueError(
            f"no row can be read from {self.layer_class.__name__}.forward: `{line}` {what}. Write a row for it with "
            "register_family, if the words for rows can say it."
        )

    def block(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            if self.returned:
                return
            self.statement(statement)

    def statement(self, node: Any) -> None:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return
        if isinstance(node, ast.If):
            self.condition(node)
        elif isinstance(node, ast.Return):
            first = node.value.elts[0] if isinstance(node.value, ast.Tuple) and node.value.elts else node.value
            value = self.tuples[first.id] if isinstance(first, ast.Name) and first.id in self.tuples else None
            value = self.value(first) if value is None else value
            if value != Residual(len(self.steps)):
                self.refuse(node, "returns something else than the sum")
            self.returned = True
        elif isinstance(node, ast.Assign) and len(node.targets) == 1:
            self.assign(node.targets[0], node.value, node)
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            self.augment(node)
        elif self.mentions(node):
            self.refuse(node, "is no plain assignment")

    def augment(self, node: Any) -> None:
        name = node.target.id
        if name in self.tuples:
            return  # what is returned beside the hidden states
        whole = ast.BinOp(ast.Name(name, ast.Load()), node.op, node.value)
        self.assign(node.target, ast.copy_location(whole, node), node)

    def assign(self, target: Any, value: Any, node: Any) -> None:
        if isinstance(target, ast.Tuple):
            found = self.value(value)
            first: Any = target.elts[0]
            for part in target.elts:
                for name in ast.walk(part):
                    if isinstance(name, ast.Name):
                        self.values.pop(name.id, None)
                        self.tuples.pop(name.id, None)
            if found is not None:
                if not isinstance(found, Branch) or not isinstance(first, ast.Name):
                    self.refuse(node, "takes the residual apart")
                self.values[first.id] = found
            return
        if not isinstance(target, ast.Name):
            if self.mentions(node):
                self.refuse(node, "writes into something")
            return
        beside = isinstance(value, ast.Tuple) and bool(value.elts)
        found = self.value(value.elts[0] if beside else value)
        self.values.pop(target.id, None)
        self.tuples.pop(target.id, None)
        if beside:
            self.tuples[target.id] = found
            return
        if found is not None:
            self.values[target.id] = found

    def condition(self, node: ast.If) -> None:
        taken = evaluated(node.test, self.layer)
        if taken is not None:
            self.block(node.body if taken else node.orelse)
            return
        for statement in (*node.body, *node.orelse):
            # What is returned beside the hidden states may depend on arguments.
            names = [n for n in ast.walk(statement) if isinstance(n, ast.Name)]
            target = getattr(statement, "target", None) or next(iter(getattr(statement, "targets", [])), None)
            beside = isinstance(target, ast.Name) and target.id in self.tuples
            if any(n.id in self.values for n in names) and not beside:
                self.refuse(node, "depends on an argument")
            if isinstance(statement, ast.Return):
                self.refuse(node, "returns on a condition")

    def mentions(self, node: ast.AST) -> bool:
        return any(isinstance(n, ast.Name) and n.id in self.values for n in ast.walk(node))

    def value(self, node: Any) -> Value:
        """What an expression holds of the residual; None if nothing."""
        if isinstance(node, ast.Name):
            return self.values.get(node.id, self.tuples.get(node.id))
        if not self.mentions(node) and not any(
            isinstance(n, ast.Name) and self.tuples.get(n.id) is not None for n in ast.walk(node)
        ):
            return None
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self.added(self.value(node.left), self.value(node.right), node)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            return self.scaled(node)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and node.slice.value == 0:
            found = self.value(node.value)
            if isinstance(found, Branch):
                return found
        elif isinstance(node, ast.Subscript) and isinstance(self.value(node.value), Branch):
            return None  # what a module returns beside its output
        if isinstance(node, ast.Call):
            return self.called(node)
        return self.refuse(node, "is not understood")

    def scaled(self, node: ast.BinOp) -> Value:
        for side, other in ((node.left, node.right), (node.right, node.left)):
            found, path = self.value(side), own_path(other)
            if isinstance(found, Branch) and path is not None and found.scale is None:
                return replace(found, scale=path)
            if isinstance(found, Sum) and path is not None and found.scale is None:
                return found._replace(scale=path)
        return self.refuse(node, "is no branch times an attribute")

    def added(self, left: Value, right: Value, node: ast.AST) -> Value:
        pair = (left, right) if isinstance(left, Residual) else (right, left)
        residual, other = pair
        if isinstance(residual, Residual) and isinstance(other, Branch | Sum):
            step = other if isinstance(other, Sum) else Sum((other,))
            reads = {branch.reads for branch in step.branches}
            if residual.steps == len(self.steps) and reads == {residual.steps}:
                self.steps.append(step)
                return Residual(len(self.steps))
            last = self.steps[-1] if self.steps else step
            plain = step.scale is None and last.scale is None
            if residual.steps == len(self.steps) and reads == {residual.steps - 1} and plain:
                # Parallel branches, one after the other; the layer of this package sums them first.
                self.steps[-1] = Sum((*last.branches, *step.branches))
                self.exact = False
                return residual
        if isinstance(left, Branch | Sum) and isinstance(right, Branch | Sum):
            sums = [side if isinstance(side, Sum) else Sum((side,)) for side in (left, right)]
            if all(part.scale is None for part in sums):
                return Sum((*sums[0].branches, *sums[1].branches))
        return self.refuse(node, "is no sum of the residual and branches that read it")

    def called(self, node: ast.Call) -> Value:
        path = own_path(node.func)
        if path is None or not callable(attribute(self.layer, path)):
            if ast.unparse(node.func).rpartition(".")[2] == "dropout" and len(node.args) == 1:
                return self.dropped(node)
            return self.refuse(node, "is no call of a module of the layer")
        named, _ = forward_parameters(attribute(self.layer, path))
        given: dict[str, ast.expr] = dict(zip(named, node.args))
        spread = False
        for keyword in node.keywords:
            if keyword.arg is None:
                spread = isinstance(keyword.value, ast.Name) and keyword.value.id == self.others
                if not spread:
                    return self.refuse(node, "passes on something else than the arguments of the layer")
            else:
                given[keyword.arg] = keyword.value
        if len(node.args) > len(named) or not named:
            return self.refuse(node, "passes arguments that have no name")
        read = self.value(given.pop(named[0])) if named[0] in given else None
        if read is None or any(self.mentions(value) for value in given.values()):
            return self.refuse(node, "is not given the residual, or a branch, as its first argument alone")
        if isinstance(read, Sum) or (isinstance(read, Branch) and read.scale is not None):
            return self.refuse(node, "follows a sum or a factor")
        before = read if isinstance(read, Branch) else Branch(read.steps, ())
        names = (*before.names, path)
        if not given and not (spread and self.uses_others(path)):
            return replace(before, names=names)
        if before.attention is not None or len(before.names) > 1:
            return self.refuse(node, "takes arguments of the layer behind other modules")
        return replace(before, names=names, attention=len(names) - 1, renames=self.renames(node, given, named, spread))

    def uses_others(self, path: str) -> bool:
        """Whether a module does anything with the arguments that it does not name."""
        module_class: Any = type(attribute(self.layer, path))
        definition = forward_source(module_class)
        others = definition.args.kwarg
        names = [node.id for node in ast.walk(definition) if isinstance(node, ast.Name)]
        return others is not None and others.arg in names

    def renames(
        self, node: ast.AST, given: dict[str, ast.expr], named: tuple[str, ...], spread: bool
    ) -> tuple[tuple[str, str], ...]:
        """How the arguments of the layer reach a module, which must be given all that both name."""
        cache, own_cache = cache_name(self.arguments), cache_name(named)
        renames = []
        for name, value in given.items():
            if not isinstance(value, ast.Name) or value.id not in self.arguments:
                return self.refuse(node, f"is given as {name} something else than an argument of the layer")
            if value.id != name and not (value.id == cache and name == own_cache):
                renames.append((value.id, name))
        for name in set(self.arguments[1:]) & set(named) - given.keys():
            return self.refuse(node, f"is not given the argument {name} of the layer, which it takes")
        if spread and self.others is None:
            return self.refuse(node, "passes on arguments that the layer does not take")
        return tuple(renames)

    def dropped(self, node: ast.Call) -> Value:
        """`dropout(branch, p=self.p, training=self.training)`."""
        found, keywords = self.value(node.args[0]), {keyword.arg: keyword.value for keyword in node.keywords}
        path = own_path(keywords["p"]) if "p" in keywords else None
        training = "training" in keywords and own_path(keywords["training"]) == "training"
        if isinstance(found, Branch) and path and training and keywords.keys() == {"p", "training"} and not found.scale:
            return replace(found, names=(*found.names, path))
        return self.refuse(node, "is no dropout of a branch with a probability of the layer")
