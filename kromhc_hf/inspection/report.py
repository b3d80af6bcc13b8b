"""One self-contained HTML page with pictures of what the streams of a model do."""

import json
import os
import warnings
from collections.abc import Callable
from html import escape
from itertools import groupby
from pathlib import Path

from .inspection import Inspection
from .plots import require_matplotlib
from .report_sections import Picture, Section, sections
from .tables import BRANCH_COLUMNS, branch_rows, total_rows
from .themed_svg import css_variables, to_svg


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


def write_report(
    inspection: Inspection,
    path: str | os.PathLike[str],
    before: Inspection | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the report on a model as one HTML file that needs nothing else: no network, no other file, no script.

    It follows the reader's choice of light or dark, and fits a screen from 400 pixels. All numbers are in it as JSON
    too, in the element with the id `numbers`.

    Args:
        inspection: what `inspect_checkpoints` or `inspect_model` made.
        path: the file; its folder is made, and an existing file is replaced.
        before: of an earlier checkpoint on the same tokens, to compare with.
        progress: called with the pictures drawn and their number.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    require_matplotlib()
    page = report_html(inspection, before, progress)
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page, encoding="utf-8")


def report_html(
    inspection: Inspection,
    before: Inspection | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """The text of the report, see `write_report`."""
    parts = sections(inspection, before)
    total, done = sum(len(part.pictures) for part in parts), 0
    bodies = []
    for part in parts:
        figures = []
        for picture in part.pictures:
            with warnings.catch_warnings():
                # The browser has the letters that matplotlib's own font lacks.
                warnings.filterwarnings("ignore", message="Glyph .* missing")
                svg = to_svg(picture.draw(), f"f{done}", picture.label)
            figures.append((picture, f"<figure>{svg}</figure>"))
            done += 1
            if progress is not None:
                progress(done, total)
        bodies.append(_section(part, figures))
    numbers = {"model": inspection.to_dict(), "before": None if before is None else before.to_dict()}
    # Inside a script element only "</" could end it.
    data = json.dumps(numbers).replace("</", "<\\/")
    title = f"What the streams of {escape(inspection.name)} do"
    than = "" if before is None else f"<p>Compared with {escape(before.name)}, the one before.</p>"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        # Without an icon of its own, a browser asks the server for one.
        f'<link rel="icon" href="data:,"><title>{title}</title><style>{css_variables()}{STYLE}</style></head>'
        f"<body><main><h1>{title}</h1>{than}{_totals(inspection, before)}{''.join(bodies)}{_branches(inspection)}"
        f'</main><script type="application/json" id="numbers">{data}</script></body></html>\n'
    )


def _section(part: Section, figures: list[tuple[Picture, str]]) -> str:
    html = [f"<section><h2>{escape(part.title)}</h2>", f"<p>{escape(part.text)}</p>" if part.text else ""]
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


def _totals(inspection: Inspection, before: Inspection | None) -> str:
    rows = total_rows(inspection)
    columns = [dict(total_rows(model)) for model in (before, inspection) if model is not None]
    head = "<tr><th></th><th>before</th><th>after</th></tr>" if before else ""
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(column[name])}</td>' for column in columns)}</tr>"
        for name, _ in rows
    )
    return f"<table>{head}{body}</table>"


def _branches(inspection: Inspection) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in BRANCH_COLUMNS)
    body = "".join(f"<tr>{''.join(f'<td>{escape(v)}</td>' for v in row)}</tr>" for row in branch_rows(inspection))
    return (
        '<section><h2>Branch by branch, in numbers</h2><div class="scroll" tabindex="0" role="region" '
        f'aria-label="table of the branches"><table class="branches"><tr>{head}</tr>{body}</table></div></section>'
    )
