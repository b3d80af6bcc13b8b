"""For the reference pages: shows the options of hyper-connections where the source says `**options`.

Pages are made from the source, which spells options out in one place alone. Signatures and docstrings that the package
makes from there are taken from the package as it is imported.
"""

import inspect
from importlib import import_module
from typing import Any

import griffe


MARK = "**options:"
KINDS = {
    inspect.Parameter.POSITIONAL_ONLY: griffe.ParameterKind.positional_only,
    inspect.Parameter.POSITIONAL_OR_KEYWORD: griffe.ParameterKind.positional_or_keyword,
    inspect.Parameter.KEYWORD_ONLY: griffe.ParameterKind.keyword_only,
}


def imported(found: griffe.Object) -> Any:
    """The object of the imported package that griffe has found in the source."""
    # PEFT first: at the end of its import it asks for the package's own modules.
    for module in ("kromhc_hf", "peft"):
        import_module(module)
    thing: Any = import_module(found.module.path)
    for name in found.path.removeprefix(f"{found.module.path}.").split("."):
        thing = getattr(thing, name)
    return thing


def documented(found: griffe.Object) -> bool:
    return found.docstring is not None and MARK in found.docstring.value


def parameter(found: inspect.Parameter) -> griffe.Parameter:
    kind, default = KINDS[found.kind], None if found.default is found.empty else repr(found.default)
    name = getattr(found.annotation, "__name__", str(found.annotation))
    annotation = None if found.annotation is found.empty else name
    return griffe.Parameter(found.name, annotation=annotation, kind=kind, default=default)


class ShowOptions(griffe.Extension):
    """Replaces `**options` by the options, in signatures and docstrings."""

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        if any("show_options" in str(decorator.value) for decorator in func.decorators):
            thing = imported(func)
            written = {p.name: p for p in func.parameters}
            shown = inspect.signature(thing).parameters.values()
            func.parameters = griffe.Parameters(*(written.get(p.name) or parameter(p) for p in shown))
            self._describe(func)

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        self._describe(cls)

    def _describe(self, found: griffe.Object) -> None:
        if documented(found) and found.docstring is not None:
            found.docstring.value = inspect.getdoc(imported(found)) or ""
