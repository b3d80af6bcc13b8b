"""Matplotlib figures as SVG text that follows the light or dark colours of the page around it."""

import io
import re
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Figures are drawn in the colours for light backgrounds; in the SVG each of them becomes a CSS variable. The series are
# those of Okabe and Ito, told apart with every kind of colour blindness, darkened or lightened for contrast.
LIGHT = {
    "ink": "#1f2328",
    "grid": "#d3d7dc",
    "series-0": "#0067a6",
    "series-1": "#b84e00",
    "series-2": "#00785a",
    "series-3": "#a3497b",
    "series-4": "#8a6100",
    "series-5": "#4d5560",
}
DARK = {
    "ink": "#e6e9ee",
    "grid": "#3b424b",
    "series-0": "#56b4e9",
    "series-1": "#f58a3c",
    "series-2": "#2fc79a",
    "series-3": "#e59cc4",
    "series-4": "#f0c244",
    "series-5": "#b4bcc8",
}
INK, GRID = LIGHT["ink"], LIGHT["grid"]
SERIES = [value for name, value in LIGHT.items() if name.startswith("series")]


def css_variables() -> str:
    """The style rules that give the variables their values, for light and for dark."""
    light, dark = ("".join(f"--{name}:{value};" for name, value in colours.items()) for colours in (LIGHT, DARK))
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"


def to_svg(figure: "Figure", prefix: str, label: str, *, standalone: bool = False) -> str:
    """Draws a figure as an SVG element with text that stays text, and colours that are CSS variables.

    Args:
        figure: drawn with `INK`, `GRID` and `SERIES`.
        prefix: put in front of every id, so that several figures fit on one page.
        label: what the picture shows, for those who cannot see it.
        standalone: make a whole SVG file that brings the variables along.
    """
    import matplotlib

    buffer = io.StringIO()
    # The salt makes equal figures equal text.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for name, value in LIGHT.items():
        svg = svg.replace(value, f"var(--{name})")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    width, height = (float(size) for size in re.findall(r'(?:width|height)="([\d.]+)pt"', svg)[:2])
    name = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    size = f'viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{name}"'
    if standalone:
        space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        head = f'<svg {space} width="{width:g}pt" height="{height:g}pt" {size}><style>{css_variables()}</style>'
    else:
        head = f'<svg style="--width:{width:g}pt" {size}>'
    return head + svg[svg.index(">") + 1 :]
