"""Options of the command line that are made from data, and those that need more than their type."""

import runpy
from collections.abc import Callable
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .modeling.option_table import OPTIONS, described_option
from .modeling.outside_families import REGISTERED


if TYPE_CHECKING:
    from .modeling.options import StreamOptions


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Subfolder = Annotated[str, typer.Option(help="Where the base is in its folder or repository.")]
WeightVariant = Annotated[
    str | None, typer.Option(help="Which set of weights of the base: fp16 for model.fp16.safetensors.")
]
Private = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]
TrustCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code in the folder of a base whose family has a row from outside."),
]
Family = Annotated[
    Path | None,
    typer.Option(help="Python file that is run first and registers a row with register_family, or TOML file with one."),
]


def stream_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command an option for every option of hyper-connections, in the place of its `**options`."""
    present = [p for p in signature(command).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    parameters = [p for p in present if p.default is Parameter.empty]
    for name, option in OPTIONS.items():
        spelled = f"--{name.replace('_', '-')}"
        # What is on by default needs a word that turns it off.
        names = ("/".join((spelled, *option.flags)),) if option.default is True else (spelled, *option.flags)
        kind = option.kind if option.read is None else str | None
        hint: Any = Annotated[kind, typer.Option(*names, help=described_option(option))]
        parameters.append(Parameter(name, Parameter.KEYWORD_ONLY, default=option.default, annotation=hint))
    # What is not about hyper-connections comes last in the help.
    parameters += [p.replace(kind=Parameter.KEYWORD_ONLY) for p in present if p.default is not Parameter.empty]
    shown: Any = command
    shown.__signature__ = signature(command).replace(parameters=parameters)
    return command


def refuse_unread(context: typer.Context, options: "StreamOptions") -> None:
    """Refuses an option that was given and that nothing reads beside the others."""
    for name, reason in options.without_effect().items():
        # By name: the enumeration is click's, which some releases of typer have inside.
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"--{name.replace('_', '-')} would have no effect: {reason}. Leave it out.")


def run_family_file(path: Path | None) -> None:
    """Registers the family in a file of the user; a Python file is run for that.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it registers nothing, or what a TOML file says is no row.
    """
    if path is None:
        return
    if not path.is_file():
        raise FileNotFoundError(f"--family must be a Python or TOML file; got {path}, which does not exist.")
    if path.suffix == ".toml":
        from .family_file import register_family_file

        register_family_file(path)
        return
    before = dict(REGISTERED)
    runpy.run_path(str(path))
    if all(before.get(name) is family for name, family in REGISTERED.items()):
        raise ValueError(f"--family must register a row; {path} does not. Call kromhc_hf.register_family in it.")


def parse_layers(text: str | None) -> str | range | None:
    """`8:12` as a range, of layers to compare; None and `all` as they are."""
    if text is None or text == "all":
        return text
    first, colon, stop = text.partition(":")
    if not (colon and first.isdecimal() and stop.isdecimal()):
        raise ValueError(
            f"layers must be all, or first:stop with two whole numbers; got {text!r}. Use for example 0:4."
        )
    return range(int(first), int(stop))


def learning_rates(text: str) -> list[float]:
    """`1e-4,3e-4` as numbers."""
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"lr must be numbers with commas between; got {text!r}. Use for example 1e-4,3e-4.") from error
    if not all(0 < rate < float("inf") for rate in rates):
        raise ValueError(f"lr must be above 0; got {text!r}. Use for example 1e-4,3e-4.")
    return rates
