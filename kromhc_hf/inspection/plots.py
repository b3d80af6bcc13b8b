"""Pictures of what the streams do, as matplotlib figures: heat maps, and curves over depth."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .tables import short_name
from .themed_svg import GRID, INK, SERIES


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches; texts of 9 points stay readable when a figure is scaled down to a phone of 400 pixels.
WIDTH, SMALL = 4.0, 1.75
TOKEN_WIDTH = 0.17
MOST_TICKS, MOST_ROWS = 16, 32
# Both go from dark to light without a turn, and are told apart with every kind of colour blindness.
SEQUENTIAL, DIVERGING = "cividis", "PuOr"

Curve = tuple[str, Sequence[float]]


def require_matplotlib() -> None:
    """Says how to get matplotlib where it is missing.

    Raises:
        ValueError: with the command.
    """
    if find_spec("matplotlib") is None:
        raise ValueError('pictures need matplotlib, which is not installed. Use pip install "kromhc-hf[plots]".')


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of a size in inches, with a layout that leaves room for all labels."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # The letters of the browser's font may be taller than those that the layout is made with.
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.07, h_pad=0.07))


def draw_matrix(
    panel: "Axes", matrix: Tensor, title: str, limits: tuple[float, float] = (0, 1), colours: str = SEQUENTIAL
) -> Any:
    """Draws one `[n, n]` matrix with streams as rows and columns; up to 5 x 5 the values are written into it."""
    image = panel.pcolormesh(matrix.numpy(), vmin=limits[0], vmax=limits[1], cmap=colours, edgecolors="face")
    if len(matrix) <= 5:
        write_values(panel, image, matrix)
    panel.set_title(title, fontsize=9, color=INK)
    ticks = range(0, len(matrix), -(-len(matrix) // 6))
    panel.set_xticks([i + 0.5 for i in ticks], list(map(str, ticks)))
    panel.set_yticks([i + 0.5 for i in ticks], list(map(str, ticks)))
    panel.set_xlabel("from stream (index)", fontsize=8)
    panel.set_ylabel("to stream (index)", fontsize=8)
    panel.invert_yaxis()
    panel.set_aspect("equal")
    style(panel, grid=False)
    return image


def write_values(panel: "Axes", image: Any, matrix: Tensor) -> None:
    """Writes every value into its cell, in black or white, whichever stands out more."""
    for i, row in enumerate(matrix.tolist()):
        for j, value in enumerate(row):
            red, green, blue, _ = image.cmap(image.norm(value))
            colour = "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#ffffff"
            text = f"{value:.2f}".replace("-0.00", "0.00")
            panel.text(j + 0.5, i + 0.5, text, ha="center", va="center", color=colour, fontsize=8)


def style(panel: "Axes", *, grid: bool = True) -> None:
    """Gives a panel the colours that follow the theme, and labels of readable size."""
    panel.tick_params(colors=INK, labelsize=8, width=0.6, length=2)
    for label in (panel.xaxis.label, panel.yaxis.label, panel.title):
        label.set_color(INK)
    for name, spine in panel.spines.items():
        spine.set_visible(grid and name in ("left", "bottom"))
        spine.set_color(INK)
        spine.set_linewidth(0.6)
    if grid:
        panel.grid(color=GRID, linewidth=0.6)
        panel.set_axisbelow(True)


def matrix_figure(
    matrix: Tensor, title: str, limits: tuple[float, float] = (0, 1), colours: str = SEQUENTIAL, framed: bool = False
) -> "Figure":
    """One `[n, n]` matrix as a small heat map."""
    from matplotlib.figure import Figure

    # Deep models have many of these, and to compute a layout takes longer than to draw.
    figure = Figure(figsize=(SMALL, SMALL + 0.3))
    panel = figure.add_axes((0.24, 0.2, 0.72, 0.615))
    draw_matrix(panel, matrix, title, limits, colours)
    if framed:
        frame(panel)
    return figure


def frame(panel: "Axes") -> None:
    """Marks a heat map among its like."""
    for spine in panel.spines.values():
        spine.set(visible=True, color=SERIES[1], linewidth=2.5)


def scale_figure(label: str, limits: tuple[float, float], colours: str = SEQUENTIAL) -> "Figure":
    """The colour scale that several heat maps share."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure = new_figure(WIDTH * 0.7, 0.62)
    panel = figure.subplots()
    bar = figure.colorbar(ScalarMappable(Normalize(*limits), colours), cax=panel, orientation="horizontal")
    bar.set_label(label, fontsize=9)
    style(panel, grid=False)
    return figure


def depth_map_figure(values: Tensor, branches: Sequence[str], label: str, limits: tuple[float, float]) -> "Figure":
    """A weight per stream over depth as a heat map, `[branches, n]`: streams downwards, branches to the right."""
    figure = new_figure(WIDTH, 1.35 + 0.24 * values.shape[1])
    panel = figure.subplots()
    image = panel.pcolormesh(values.T.numpy(), vmin=limits[0], vmax=limits[1], cmap=SEQUENTIAL, edgecolors="face")
    if len(values) <= 12:
        write_values(panel, image, values.T)
    bar = figure.colorbar(image, ax=panel, location="top", aspect=40, pad=0.02)
    bar.set_label(label, fontsize=9, color=INK)
    style(bar.ax, grid=False)
    streams = range(0, values.shape[1], -(-values.shape[1] // 8))
    panel.set_yticks([i + 0.5 for i in streams], list(map(str, streams)))
    panel.set_ylabel("stream (index)", fontsize=9)
    panel.invert_yaxis()
    name_branches(panel, branches, 0.5)
    style(panel, grid=False)
    return figure


def name_branches(panel: "Axes", branches: Sequence[str], offset: float = 0.0) -> None:
    """Puts the branches on the x axis, every one or, of many, every k-th."""
    ticks = range(0, len(branches), -(-len(branches) // MOST_TICKS))
    panel.set_xticks([i + offset for i in ticks], [short_name(branches[i]) for i in ticks], rotation=90)
    panel.set_xlabel("residual branch (layer and kind, input to the left)", fontsize=9)


def curves_figure(
    curves: Sequence[Curve],
    branches: Sequence[str],
    label: str,
    *,
    earlier: Sequence[Curve] = (),
    floor: float | None = None,
    span: float = 0.0,
) -> "Figure":
    """Curves over depth, one point per branch; those of an earlier checkpoint are dashed.

    Args:
        curves: name and values, one per branch.
        branches: names of the branches.
        label: what the y axis shows, with its unit.
        earlier: curves of the same names and in the same order.
        floor: makes the y axis logarithmic above this value and linear below, so that 0 can be shown.
        span: the least that the y axis spans, so that rounding does not look like a signal.
    """
    figure = new_figure(WIDTH, 2.6 + 0.17 * (len(curves) + bool(earlier)) / 2)
    panel = figure.subplots()
    depth = range(len(branches))
    for i, (name, values) in enumerate(curves):
        # Later curves are thinner, so that equal ones can all be seen.
        left = len(curves) - 1 - i
        size, width, shape = 3 + 0.6 * left, 1.3 + 0.5 * left, "osD^vX"[i]
        (line,) = panel.plot(depth, values, color=SERIES[i], marker=shape, label=name)
        line.set(markersize=size, linewidth=width, markevery=-(-len(depth) // 32))
    for i, (_, values) in enumerate(earlier):
        legend = "before" if i == 0 else None
        panel.plot(depth, values, color=SERIES[i], linestyle="--", linewidth=1.2, label=legend)
    if floor is not None:
        panel.set_yscale("symlog", linthresh=floor)
        panel.set_ylim(bottom=-floor / 4)
    low, high = panel.get_ylim()
    if floor is None and high - low < span:
        panel.set_ylim((low + high - span) / 2, (low + high + span) / 2)
    if floor is None:
        panel.ticklabel_format(axis="y", useOffset=False)
    panel.set_ylabel(label, fontsize=9)
    name_branches(panel, branches)
    style(panel)
    if len(curves) + len(earlier) > 1:
        figure.legend(loc="outside upper left", ncols=2, fontsize=8.5, frameon=False, labelcolor=INK)
    return figure


def token_map_figure(values: Tensor, branches: Sequence[str], tokens: Sequence[str], label: str) -> "Figure":
    """A value per branch and token as a heat map `[branches, S]`, with the tokens under it."""
    from matplotlib.ticker import MaxNLocator

    # A row has the height of its name, as long as every row is named.
    height = 1.75 + 0.17 * min(len(branches), MOST_ROWS) + 0.03 * max(0, len(branches) - MOST_ROWS)
    figure = new_figure(max(3.2, 1.3 + TOKEN_WIDTH * len(tokens)), height)
    panel = figure.subplots()
    image = panel.imshow(values.numpy(), vmin=0, cmap=SEQUENTIAL, aspect="auto", interpolation="none")
    # Short enough to be seen at once on a phone.
    share = min(1, 12 / len(tokens))
    bar = figure.colorbar(
        image, ax=panel, location="top", anchor=(0.0, 0.0), shrink=share, aspect=24, ticks=MaxNLocator(3)
    )
    bar.set_label(label, fontsize=9, color=INK, loc="left")
    style(bar.ax, grid=False)
    panel.set_xticks(range(len(tokens)), [visible(token) for token in tokens], rotation=90)
    for text in panel.get_xticklabels():
        # A dollar sign in the text is no formula.
        text.set_parse_math(False)
    rows = range(0, len(branches), -(-len(branches) // MOST_ROWS))
    panel.set_yticks(list(rows), [short_name(branches[i]) for i in rows])
    panel.set_ylabel("residual branch", fontsize=9)
    panel.set_xlabel("token", fontsize=9, loc="left")
    style(panel, grid=False)
    return figure


def visible(token: str) -> str:
    """A token as it can be written under a picture: at most 12 characters, with signs for what cannot be seen."""
    text = "".join(c if c.isprintable() else {"\n": "⏎", "\t": "⇥"}.get(c, "�") for c in token.strip(" ") or "␣")
    return text if len(text) <= 12 else text[:11] + "…"
