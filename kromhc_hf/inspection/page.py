"""One self-contained HTML page: sections with pictures, light or dark, from 400 pixels on."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ..json_text import json_text
from .themed_svg import css_variables, to_svg


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of the page, between its pictures and beside them, in pixels.
PAGE, GAP, MARGIN = 1200, 8, 16
# The least width of a picture in the layouts that put many into rows.
CELLS = {"small": 160, "tiny": 84}
STYLE = """
:root{color-scheme:light dark;--page:#fff;--card:#f6f7f9}
@media (prefers-color-scheme:dark){:root{--page:#14171b;--card:#1d2127}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1200px;margin:0 auto;padding:16px}
h1{font-size:1.6rem;line-height:1.25;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:2.2rem 0 .4rem}
h3{font-size:1rem;margin:1.2rem 0 .4rem}
p{max-width:75ch;margin:.4rem 0 .8rem}
figure{margin:0;background:var(--card);border-radius:8px;padding:8px;min-width:0}
svg{display:block;width:100%;height:auto;margin:0 auto}
svg text{font-family:system-ui,sans-serif!important}
.tiny figure{padding:4px}
.large svg{max-width:calc(1.6*var(--width))}
.large{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));margin-top:12px}
.scale{max-width:420px;margin:0 0 8px}
.scroll{overflow-x:auto;margin:0 0 12px}
.scroll svg{width:var(--width);max-width:none;margin:0}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:3px 14px 3px 0;border-bottom:1px solid var(--grid);vertical-align:top}
.branches td{white-space:nowrap}
"""


@dataclass(frozen=True)
class Picture:
    """One picture: its layout (`small`, `tiny`, `large`, `scale` or `scroll`), what it shows, how it is drawn."""

    kind: str
    label: str
    draw: Callable[[], "Figure"]


@dataclass(frozen=True)
class Section:
    """A headline, a few sentences and the pictures under them."""

    title: str
    text: str
    pictures: list[Picture]


def most_columns(cell: int, width: int = PAGE) -> int:
    """How many cells of this least width fit beside each other on a page of this width."""
    return (width - 2 * MARGIN + GAP) // (cell + GAP)


def grid_rules() -> str:
    """The style rules of the layouts in `CELLS`: each width of the page takes the columns that `grid_columns` gives."""
    rules = []
    for kind, cell in CELLS.items():
        rules.append(
            f".{kind}{{--columns:var(--columns-1);--turn:auto;display:grid;gap:{GAP}px;"
            f"grid-template-columns:repeat(var(--columns),minmax(0,{1.35 * cell:g}px))}}"
            f".{kind}>:nth-last-child(2){{grid-column-start:var(--turn)}}"
        )
        for fits in range(2, most_columns(cell) + 1):
            least = fits * (cell + GAP) - GAP + 2 * MARGIN
            given = f"--columns:var(--columns-{fits});--turn:var(--turn-{fits})"
            rules.append(f"@media (min-width:{least}px){{.{kind}{{{given}}}}}")
    return "\n".join(rules)


def grid_columns(count: int, kind: str) -> str:
    """CSS variables that put pictures into rows of about equal length, none with a picture alone.

    Where the last row would have one, the picture before it comes along; two columns of an odd number leave one.

    Args:
        count: how many pictures there are.
        kind: a layout of `CELLS`.
    """
    variables = []
    for fits in range(1, most_columns(CELLS[kind]) + 1):
        rows = -(-count // fits)
        columns = -(-count // rows)
        turn = "1" if rows > 1 and columns > 2 and count % columns == 1 else "auto"
        variables.append(f"--columns-{fits}:{columns};--turn-{fits}:{turn}")
    return ";".join(variables)


def page(title: str, body: str, numbers: Any) -> str:
    """The text of the page.

    Args:
        title: its headline.
        body: HTML under it.
        numbers: what JSON can say; it is in the page in the element with the id `numbers`.
    """
    # Inside a script element only "</" could end it.
    data = json_text(numbers, indent=None).replace("</", "<\\/")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        # Without an icon of its own, a browser asks the server for one.
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title>'
        f"<style>{css_variables()}{STYLE}{grid_rules()}</style></head>"
        f"<body><main><h1>{escape(title)}</h1>{body}</main>"
        f'<script type="application/json" id="numbers">{data}</script></body></html>\n'
    )


def drawn(sections: Sequence[Section], progress: Callable[[int, int], None] | None = None) -> str:
    """The HTML of sections.

    Args:
        sections: in their order.
        progress: called with the pictures drawn and their number.
    """
    total, done = sum(len(section.pictures) for section in sections), 0
    bodies = []
    for section in sections:
        figures = []
        for picture in section.pictures:
            with warnings.catch_warnings():
                # The browser has the letters that matplotlib's own font lacks.
                warnings.filterwarnings("ignore", message="Glyph .* missing")
                svg = to_svg(picture.draw(), f"f{done}", picture.label)
            figures.append((picture, f"<figure>{svg}</figure>"))
            done += 1
            if progress is not None:
                progress(done, total)
        bodies.append(section_html(section, figures))
    return "".join(bodies)


def section_html(section: Section, figures: Sequence[tuple[Picture, str]]) -> str:
    """The HTML of one section, with its pictures as they were drawn."""
    html = [f"<section><h2>{escape(section.title)}</h2>", f"<p>{escape(section.text)}</p>" if section.text else ""]
    for kind, group in groupby(figures, key=lambda pair: pair[0].kind):
        if kind == "scroll":
            # What scrolls can be reached with the keyboard.
            for picture, figure in group:
                label = escape(picture.label)
                region = f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
                html.append(f"<h3>{label}</h3>{region}{figure}</div>")
        else:
            shown = [figure for _, figure in group]
            grid = f' style="{grid_columns(len(shown), kind)}"' if kind in CELLS else ""
            html.append(f'<div class="{kind}"{grid}>{"".join(shown)}</div>')
    return "".join([*html, "</section>"])
