"""The page of the demo: what was proved, two losses in one picture, and the mixing matrices before and after."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .conversion.report import ConversionReport
from .inspection.inspection import mean_mapping
from .inspection.page import Picture, Section, drawn, page
from .inspection.plots import WIDTH, matrix_figure, new_figure, scale_figure, style
from .inspection.recording import BranchRecord
from .inspection.tables import short_name
from .inspection.themed_svg import INK, SERIES


if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALE = "weight (no unit), mean over tokens"


@dataclass(frozen=True)
class Curve:
    """Losses on held-out text in nats per token, and after how many steps of training."""

    steps: list[int]
    losses: list[float]


@dataclass(frozen=True)
class DemoReport:
    """What the demo measured, and where its results are."""

    conversion: ConversionReport
    without_streams: Curve
    with_streams: Curve
    loss_reloaded: float
    undone: bool  # whether the base came back bit for bit
    text_before: str
    text_after: str
    page: Path
    converted: Path
    tuned: Path


def write_demo_page(
    path: Path,
    found: DemoReport,
    before: Mapping[str, BranchRecord],
    after: Mapping[str, BranchRecord],
    conversion: dict[str, Any],
) -> None:
    """Writes one HTML file that needs nothing else.

    Args:
        path: the file.
        found: what the demo measured.
        before: the mappings of the converted model, by branch.
        after: those of the trained one.
        conversion: the report of the conversion, for the numbers in the page.
    """
    report = found.conversion
    plain, streams = found.without_streams, found.with_streams
    same = "the same bits" if report.bitwise_equal else f"apart by up to {report.max_logit_difference:.1e}"
    undone = "Every tensor, every name and the class are those of the base." if found.undone else "They differ."
    sections = [
        Section(
            "Nothing changed",
            f"A GPT-2 of 1 M parameters got four residual streams and {report.added_parameters:,} new parameters. On "
            f"{report.tokens} tokens the logits of base and converted model are {same}.",
            [],
        ),
        Section(
            "The same training, with streams and without",
            f"Both saw the same {plain.steps[-1]} batches of Shakespeare; the loss is on text that neither saw. One "
            "model of this size and one seed prove no gain: the command kromhc compare has seeds, error bars and the "
            "controls that tell whether it is the streams.",
            [Picture("large", "held-out loss over the steps", partial(losses_figure, plain, streams))],
        ),
        _matrices("How the streams mix: after the conversion", before),
        _matrices(f"How the streams mix: after {streams.steps[-1]} steps", after),
        Section(
            "Undone",
            f"remove_hyper_connections took the streams out of the converted model again. {undone}",
            [],
        ),
        Section("What it writes, before", found.text_before, []),
        Section("What it writes, after", found.text_after, []),
    ]
    numbers = {"conversion": conversion, "without_streams": vars(plain), "with_streams": vars(streams)}
    path.parent.mkdir(parents=True, exist_ok=True)
    title = "Four residual streams in a GPT-2, and out again"
    path.write_text(page(title, drawn(sections), numbers), encoding="utf-8")


def _matrices(title: str, records: Mapping[str, BranchRecord]) -> Section:
    pictures = [Picture("scale", f"colour scale: {SCALE}", partial(scale_figure, SCALE, (0.0, 1.0)))]
    for name, record in records.items():
        draw = partial(matrix_figure, mean_mapping(record.h_res), short_name(name))
        pictures.append(Picture("small", f"mean H_res, {short_name(name)}", draw))
    return Section(title, "", pictures)


def losses_figure(plain: Curve, streams: Curve) -> "Figure":
    """The losses of the two models over the steps of training."""
    figure = new_figure(WIDTH, 2.8)
    panel = figure.subplots()
    for curve, name, shape, colour in ((plain, "without streams", "s", 1), (streams, "with four streams", "o", 0)):
        panel.plot(curve.steps, curve.losses, color=SERIES[colour], marker=shape, markersize=4, label=name)
    panel.set_xlabel("step", fontsize=9)
    panel.set_ylabel("held-out loss (nats per token)", fontsize=9)
    style(panel)
    panel.legend(fontsize=8.5, frameon=False, labelcolor=INK)
    return figure
