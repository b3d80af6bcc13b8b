"""The `kromhc` command: results on stdout, messages on stderr, exit codes as in `command_errors`.

It is longer than other files because every option is described where it stands.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column, Table

from .command_errors import ErrorsAsMessages, PipedConsole, read_text
from .command_options import (
    AsJson,
    Family,
    Private,
    Subfolder,
    TrustCode,
    WeightVariant,
    learning_rates,
    parse_layers,
    refuse_unread,
    run_family_file,
    stream_options,
)
from .command_progress import PartsWithTimes
from .conversion.disk import LINKS
from .json_text import json_text
from .modeling.option_table import check_choice
from .quiet import quiet


if TYPE_CHECKING:
    from .conversion.report import ConversionReport
    from .inspection.inspection import Inspection

# What a command needs is imported where it runs: help and wrong arguments are answered without torch.
app = typer.Typer(
    cls=ErrorsAsMessages,
    help="Hyper-connections for the language models of transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
output, messages = PipedConsole(), PipedConsole(stderr=True)


@app.command()
@stream_options
def convert(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Folder of the base checkpoint, or its Hub id.")],
    destination: Annotated[Path, typer.Argument(help="Folder to make; must not exist or be empty.")],
    revision: Annotated[str | None, typer.Option(help="Revision of the Hub repository.")] = None,
    subfolder: Subfolder = "",
    weight_variant: WeightVariant = None,
    link: Annotated[str, typer.Option(help=f"How the weight files are taken over: {', '.join(LINKS)}.")] = "copy",
    base_model: Annotated[str | None, typer.Option(help="Hub id of the base, for the model card.")] = None,
    push_to: Annotated[str | None, typer.Option(help="Upload the result to this Hub repository, USER/NAME.")] = None,
    private: Private = False,
    family: Family = None,
    trust_remote_code: TrustCode = False,
    derive: Annotated[
        bool, typer.Option("--derive", help="Load the base and read from its source what its layers look like.")
    ] = False,
    verify: Annotated[bool, typer.Option(help="Run both models and compare them.")] = True,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Write a checkpoint with n residual streams from a checkpoint without; no base tensor changes."""
    for name, value in options.items():
        check_choice(name, value)

    from .conversion.base import refuse_adapter
    from .conversion.convert import convert_checkpoint
    from .conversion.hub import check_push
    from .modeling.options import StreamOptions

    refuse_unread(context, StreamOptions(**options))
    refuse_adapter(Path(source))
    run_family_file(family)
    if private and push_to is None:
        raise ValueError("--private would have no effect without an upload. Use it with --push-to USER/NAME.")
    if push_to is not None:
        check_push(push_to, private)
    with PartsWithTimes(messages) as parts:
        report = convert_checkpoint(
            source,
            destination,
            revision=revision,
            subfolder=subfolder,
            weight_variant=weight_variant,
            link=link,
            base_model=base_model,
            verify=verify,
            trust_remote_code=trust_remote_code,
            derive=derive,
            progress=parts.bytes_done,
            part=parts.begin,
            **options,
        )
    _finish(report, as_json)
    if push_to is not None:
        _push(destination, push_to, private)


@app.command()
def adapter(
    source: Annotated[Path, typer.Argument(help="Folder of a PEFT adapter of hyper-connections, or of a full model.")],
    destination: Annotated[Path, typer.Argument(help="Folder to make; must not exist or be empty.")],
    base: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the base, if not the one that is named.")
    ] = None,
    family: Family = None,
    trust_remote_code: TrustCode = False,
) -> None:
    """Write the full model of an adapter and its base, or of a full model the adapter that makes it from its base."""
    if find_spec("peft") is None:
        raise ValueError("adapters need the package peft, which is not installed. Use pip install 'kromhc-hf[peft]'.")
    from .conversion.files import ADAPTER_CONFIG
    from .peft.conversion import adapter_to_checkpoint, checkpoint_to_adapter

    if not source.is_dir():
        raise FileNotFoundError(f"source must be an existing folder; got {source}. Fetch it from the Hub first.")
    run_family_file(family)
    write = adapter_to_checkpoint if (source / ADAPTER_CONFIG).is_file() else checkpoint_to_adapter
    with messages.status("writing"):
        write(source, destination, base, trust_remote_code=trust_remote_code)
    output.print(f"{source} -> {destination}", soft_wrap=True)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a checkpoint with hyper-connections.")],
    repo_id: Annotated[str, typer.Argument(help="Hub repository, USER/NAME; made if it does not exist.")],
    private: Private = False,
) -> None:
    """Upload a converted checkpoint to the Hub with its model card, or go on with an upload that broke off."""
    _push(folder, repo_id, private)


@app.command()
def verify(
    base: Annotated[str, typer.Argument(help="Folder or Hub id of the base checkpoint.")],
    converted: Annotated[str, typer.Argument(help="Folder or Hub id of the converted checkpoint.")],
    text: Annotated[Path | None, typer.Option(help="File with the text to run both on.")] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Compare at most so many tokens.")] = 256,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the stored one.")] = "auto",
    layerwise: Annotated[
        str | None,
        typer.Option(
            "--layerwise",
            "--layers",
            help="Load one layer at a time, for models larger than memory, and compare all or a slice such as 8:12.",
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Revision of the base on the Hub, if not the one that it was converted from.")
    ] = None,
    subfolder: Subfolder = "",
    weight_variant: WeightVariant = None,
    family: Family = None,
    trust_remote_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Run a base model and its converted form on the same tokens; exit 1 if a lossless init is not lossless."""
    from .conversion.verification import verify_conversion

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16; got {dtype!r}.")
    sample = read_text(text)
    run_family_file(family)
    with PartsWithTimes(messages) as parts:
        report = verify_conversion(
            base,
            converted,
            text=sample,
            max_tokens=max_tokens,
            dtype=dtype,
            layers=parse_layers(layerwise),
            revision=revision,
            subfolder=subfolder,
            weight_variant=weight_variant,
            trust_remote_code=trust_remote_code,
            part=parts.begin,
        )
    _finish(report, as_json)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a checkpoint with streams.")],
    before: Annotated[str | None, typer.Option(help="An earlier checkpoint of the same model, to compare.")] = None,
    text: Annotated[Path | None, typer.Option(help="File with the text to run it on.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Take at most so many tokens.")] = 128,
    directory: Annotated[
        Path | None, typer.Option("--output", file_okay=False, help="Folder for report.html, a page with pictures.")
    ] = None,
    trust_remote_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Run a checkpoint with several streams on a text and show what they do, as a table and as pictures."""
    from .inspection.inspection import inspect_checkpoints
    from .inspection.plots import require_matplotlib
    from .inspection.report import write_report

    if directory is not None:
        require_matplotlib()
    sample = read_text(text)
    checkpoints = [model] if before is None else [model, before]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=messages, transient=True) as progress:

        def bar(description: str) -> Callable[[int, int], None]:
            task = progress.add_task(description, total=None)
            return lambda done, total: progress.update(task, completed=done, total=total)

        given: dict[str, Any] = {"text": sample, "max_tokens": max_tokens, "trust_remote_code": trust_remote_code}
        inspected = inspect_checkpoints(checkpoints, **given, progress=bar("running"))
        if directory is not None:
            earlier = inspected[1] if before is not None else None
            write_report(inspected[0], directory / "report.html", earlier, bar("drawing"))
        # Bars that are full stay, one that an error stopped does not.
        progress.live.transient = False
    if as_json:
        names = ("model", "before")
        print(json_text(dict(zip(names, (inspection.to_dict() for inspection in inspected)))))
    else:
        for inspection in reversed(inspected):
            _print_inspection(inspection)
    if directory is not None:
        messages.print(f"report: {directory / 'report.html'}", soft_wrap=True)


@app.command()
def compare(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a checkpoint without hyper-connections.")],
    text: Annotated[Path, typer.Argument(help="A text to train on; its last tenth is held out.")],
    directory: Annotated[
        Path, typer.Option("--output", file_okay=False, help="Folder for runs, table and pictures; goes on there.")
    ] = Path("comparison"),
    variants: Annotated[str, typer.Option(help="Names of variants, with commas between.")] = "kromhc",
    steps: Annotated[int, typer.Option(min=1, help="Steps of each run.")] = 100,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm; arms with one seed see the same batches.")] = 3,
    lr: Annotated[
        str, typer.Option(help="Learning rate of the backbone; of several the best is chosen per arm.")
    ] = "3e-4",
    hyper_connection_lr: Annotated[float, typer.Option(help="Learning rate of the hyper-connections.")] = 1e-2,
    length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Windows per step.")] = 8,
    held_out_windows: Annotated[int, typer.Option(min=1, help="Windows of the held-out text that are evaluated.")] = 64,
    num_streams: Annotated[int, typer.Option("--num-streams", "-n", min=2, help="Number of streams.")] = 4,
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time on a CPU, one thread each.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda; auto takes a GPU if there is one.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Train a checkpoint further with streams, without, and with the controls; a table with error bars and a plot."""
    import torch

    from .study.comparison import compare as run_comparison
    from .study.comparison import comparison, prepare
    from .study.report import table

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    workers = 1 if device != "cpu" else workers
    rates = learning_rates(lr)
    settings: dict[str, Any] = {
        **{"steps": steps, "eval_every": max(1, steps // 5), "length": length, "batch": batch},
        **{
            "num_streams": num_streams,
            "held_out_windows": held_out_windows,
            "lr": rates[0],
            "lr_grid": rates if len(rates) > 1 else None,
            "hyper_connection_lr": hyper_connection_lr,
        },
    }
    study = comparison(model, text, [name.strip() for name in variants.split(",")], seeds, settings)
    with messages.status("looking at the text, and measuring what a step of each arm costs"):
        minutes = prepare(study, directory, device) / workers / 60
    time = "about a minute" if minutes < 1.5 else f"about {minutes:.0f} minutes"
    runs = f"{len(study.arms)} arms, {seeds} seed{'s' * (seeds > 1)}, {steps} step{'s' * (steps > 1)}"
    messages.print(f"{runs}: {time}", soft_wrap=True)
    summary = run_comparison(study, directory, workers, device)
    print(json_text(summary) if as_json else table(summary))
    messages.print(f"pictures: {directory / 'differences.png'}, {directory / 'curves.png'}", soft_wrap=True)


@app.command()
def demo(
    directory: Annotated[Path, typer.Option("--output", file_okay=False, help="Folder for the results.")] = Path(
        "demo-output"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Fine-tuning steps.")] = 60,
) -> None:
    """See it work in a minute: a tiny model converted, trained beside its base, undone; one page to open."""
    from .demo import run_demo

    report = run_demo(directory, steps=steps, console=messages)
    output.print(_table(report.conversion))
    plain, streams = report.without_streams, report.with_streams
    output.print(f"held-out loss, nats per token: {plain.losses[0]:.3f} before any training")
    output.print(
        f"after {steps} steps without streams {plain.losses[-1]:.3f}, with four streams {streams.losses[-1]:.3f}"
    )
    output.print(f"the trained model saved and loaded again: {report.loss_reloaded:.3f}")
    output.print(f"undone, the base is back bit for bit: {'yes' if report.undone else 'NO'}")
    output.print(f"\nOpen {report.page} in a browser. What to try next:\n", soft_wrap=True)
    for command in (
        f"kromhc inspect {report.tuned} --before {report.converted} --output {directory / 'report'}",
        f"kromhc convert YOUR-CHECKPOINT {directory / 'mine'} --num-streams 4",
        f"kromhc compare YOUR-CHECKPOINT YOUR-TEXT.txt --output {directory / 'comparison'}",
    ):
        output.print(f"    {command}", soft_wrap=True, highlight=False)
    if not report.conversion.passed or not report.undone:
        raise typer.Exit(1)


@app.command()
def families(
    model: Annotated[
        str | None, typer.Argument(help="Folder or Hub id of a model, or a model type, to tell about it alone.")
    ] = None,
    family: Family = None,
    trust_remote_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """List the model types that are supported, and those that are refused with the reason; or tell how a model is."""
    from .families_table import families_table

    run_family_file(family)
    if model is None:
        rows = families_table()
    else:
        from .how_handled import how_handled

        rows = [how_handled(model, trust_remote_code)]
    if as_json:
        print(json_text([row._asdict() for row in rows]))
        return
    for supported, title in ((True, "supported"), (False, "refused")):
        part = [row for row in rows if row.supported == supported]
        if not part:
            continue
        count = f"{len(part)} model type{'' if len(part) == 1 else 's'}"
        table = Table(title=f"{count} {title}", title_justify="left")
        table.add_column("model type", no_wrap=True)
        table.add_column("residual steps" if supported else "reason", overflow="fold")
        if supported:
            table.add_column("logits after conversion")
        for row in part:
            table.add_row(row.model_type, escape(row.description), *([row.exactness] if supported else []))
        output.print(table)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the model, with hyper-connections or without.")],
    family: Family = None,
) -> None:
    """Serve a model over HTTP as `transformers serve` does, whose options it takes (see its --help)."""
    from .serving import serve as run_server

    run_family_file(family)
    run_server([model, *context.args])


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(help="Folder or Hub id of a model, to tell about it too.")] = None,
    family: Family = None,
    trust_remote_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Tell what is installed, which kernel would run and why, and how the tools that are there are used."""
    from .doctor import diagnosis

    run_family_file(family)
    found = diagnosis(model, trust_remote_code)
    if as_json:
        print(json_text(found))
        return
    table = Table("", Column(overflow="fold"), show_header=False, box=SIMPLE, padding=(0, 1, 0, 0))
    for name, value in found["versions"].items():
        note = f" ({found['transformers']})" if name == "transformers" else ""
        table.add_row(name, "not installed" if value is None else escape(f"{value}{note}"))
    kernel = found["kernel"]
    table.add_row("kernel", escape(f"{kernel['runs']} on {kernel['device']}: {kernel['why']}"))
    for tool in found["tools"]:
        table.add_row(escape(f"{tool['tool']} {tool['installed']}"), escape(f"{tool['outcome']}. {tool['use']}"))
    if "model" in found:
        row = found["model"]
        support = f"supported, {row['exactness']}: " if row["supported"] else "refused: "
        table.add_row(escape(f"model type {row['model_type']}"), escape(support + row["description"]))
    output.print(table)


def _print_inspection(inspection: "Inspection") -> None:
    from .inspection.tables import BRANCH_COLUMNS, branch_rows, total_rows

    table = Table(*BRANCH_COLUMNS, title=inspection.name, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for row in branch_rows(inspection):
        table.add_row(*row)
    totals = Table(show_header=False, box=SIMPLE, padding=(0, 1, 0, 0))
    for row in total_rows(inspection):
        totals.add_row(*row)
    output.print(table, totals)


def _push(folder: Path, repo_id: str, private: bool) -> None:
    from .conversion.hub import push_checkpoint

    # On stderr, where the JSON of the report is not in the way.
    messages.print(f"uploaded: {push_checkpoint(folder, repo_id, private=private or None)}", soft_wrap=True)


def _finish(report: "ConversionReport", as_json: bool) -> None:
    if as_json:
        print(json_text(report.to_dict()))
    else:
        output.print(_table(report))
    if not report.passed:
        messages.print(
            "The init promises an unchanged function, but the outputs differ. That is what training does; a model that "
            "was not trained should be converted again.",
            style="bold red",
            soft_wrap=True,
        )
        raise typer.Exit(1)


def _table(report: "ConversionReport") -> Table:
    from .conversion.report import report_rows

    table = Table(title=f"{report.source} -> {report.destination}", show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in report_rows(report):
        table.add_row(name, str(value))
    return table


def main() -> None:
    """Entry point."""
    quiet()
    app()


if __name__ == "__main__":
    main()
