"""One self-contained HTML page with pictures of what the streams of a model do."""

import os
from collections.abc import Callable
from html import escape
from pathlib import Path

from .inspection import Inspection
from .page import drawn, page
from .plots import require_matplotlib
from .report_sections import sections
from .tables import BRANCH_COLUMNS, branch_rows, total_rows


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
    body = drawn(sections(inspection, before), progress)
    than = "" if before is None else f"<p>Compared with {escape(before.name)}, the one before.</p>"
    numbers = {"model": inspection.to_dict(), "before": None if before is None else before.to_dict()}
    return page(
        f"What the streams of {inspection.name} do",
        f"{than}{_totals(inspection, before)}{body}{_branches(inspection)}",
        numbers,
    )


def _totals(inspection: Inspection, before: Inspection | None) -> str:
    columns = [dict(total_rows(model)) for model in (before, inspection) if model is not None]
    # A model that has streams from birth has lines that a converted one lacks.
    names = dict.fromkeys(name for column in columns for name in column)
    head = "<tr><th></th><th>before</th><th>after</th></tr>" if before else ""
    rows = {name: [escape(column.get(name, "")) for column in columns] for name in names}
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{value}</td>' for value in row)}</tr>" for name, row in rows.items()
    )
    return f"<table>{head}{body}</table>"


def _branches(inspection: Inspection) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in BRANCH_COLUMNS)
    body = "".join(f"<tr>{''.join(f'<td>{escape(v)}</td>' for v in row)}</tr>" for row in branch_rows(inspection))
    return (
        '<section><h2>Branch by branch, in numbers</h2><div class="scroll" tabindex="0" role="region" '
        f'aria-label="table of the branches"><table class="branches"><tr>{head}</tr>{body}</table></div></section>'
    )
