"""One self-contained HTML page: sections with pictures, light or dark, from 400 pixels on."""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any

from .themed_svg import css_variables, to_svg


if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
.small{display:grid;gap:8px;grid-template-columns:repeat(auto-fill,minmax(160px,1fr))}
.small svg{max-width:calc(1.35*var(--width))}
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
    """One picture: the layout it takes (`small`, `large`, `scale` or `scroll`), what it shows, how it is drawn."""

    kind: str
    label: str
    draw: Callable[[], "Figure"]


@dataclass(frozen=True)
class Section:
    """A headline, a few sentences and the pictures under them."""

    title: str
    text: str
    pictures: list[Picture]


def page(title: str, body: str, numbers: Any) -> str:
    """The text of the page.

    Args:
        title: its headline.
        body: HTML under it.
        numbers: what JSON can say; it is in the page in the element with the id `numbers`.
    """
    # Inside a script element only "</" could end it.
    data = json.dumps(numbers).replace("</", "<\\/")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        # Without an icon of its own, a browser asks the server for one.
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{css_variables()}{STYLE}</style></head>'
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
        bodies.append(_section(section, figures))
    return "".join(bodies)


def _section(section: Section, figures: list[tuple[Picture, str]]) -> str:
    html = [f"<section><h2>{escape(section.title)}</h2>", f"<p>{escape(section.text)}</p>" if section.text else ""]
    for kind, group in groupby(figures, key=lambda pair: pair[0].kind):
        if kind == "scroll":
            # What scrolls can be reached with the keyboard.
            for picture, figure in group:
                label = escape(picture.label)
                region = f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
                html.append(f"<h3>{label}</h3>{region}{figure}</div>")
        else:
            html.append(f'<div class="{kind}">{"".join(figure for _, figure in group)}</div>')
    return "".join([*html, "</section>"])
