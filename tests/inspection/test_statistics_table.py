"""The table of statistics is the only place that knows them: what reads it, and what is written about it by hand."""

import re
from pathlib import Path

import pytest
from support.handmade import IDENTITY, SWAP, UNIFORM, handmade
from support.runs import make_trainer, retrofitted

from kromhc_hf import StreamMetricsCallback
from kromhc_hf.inspection.inspection import Inspection
from kromhc_hf.inspection.statistics import STATISTICS, BranchInDepth, Statistic, stream_statistics
from kromhc_hf.inspection.tables import BRANCH_COLUMNS, branch_rows, total_rows
from kromhc_hf.inspection.trainer_callback import GRADIENT_NORM


DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture
def inspection() -> Inspection:
    return handmade(IDENTITY, SWAP, UNIFORM)


def logged(folder: Path) -> list[str]:
    """What the callback adds to the log, without the branches."""
    trainer = make_trainer(folder, retrofitted(), [StreamMetricsCallback()], max_steps=1)
    trainer.train()
    return [key for key in trainer.state.log_history[0] if re.fullmatch("hc/[a-z_]+", key)]


def first_cells(page: str) -> list[str]:
    """The first column of the first table of a page of the documentation, without its heading."""
    text = (DOCS / page).read_text(encoding="utf-8")
    table = re.search(r"(?:^\|.*\n)+", text, re.M)
    return re.findall(r"^\| (.*?) \|", table[0], re.M)[1:]


def test_everything_reads_the_table(inspection, tmp_path):
    names = list(STATISTICS)
    branches = list(inspection.records)
    wanted = names + [f"{branch}/{name}" for branch in branches for name in names]
    assert list(stream_statistics(inspection.records)) == wanted
    numbers = inspection.to_dict()
    assert list(numbers["total"]) == names
    assert all(set(names) <= set(branch) for branch in numbers["branches"].values())
    assert logged(tmp_path) == [f"hc/{name}" for name in [*names, GRADIENT_NORM.name]]


def test_the_terminal_and_the_report_read_the_table(inspection):
    columns = [row for row in STATISTICS.values() if row.column]
    assert BRANCH_COLUMNS[3:] == tuple(row.column for row in columns)
    for branch, cells in zip(inspection.records, branch_rows(inspection)):
        assert cells[3:] == tuple(f"{inspection.statistics[f'{branch}/{row.name}']:{row.format}}" for row in columns)
    lines = sorted((row for row in STATISTICS.values() if row.line), key=lambda row: row.line)
    assert [row.line for row in lines] == list(range(1, len(lines) + 1))
    shown = total_rows(inspection)[-len(lines) :]
    assert [label for label, _ in shown] == [row.label for row in lines]
    for row, (_, text) in zip(lines, shown):
        assert text.startswith(f"{inspection.total[row.name]:{row.format}}")


def test_a_statistic_is_one_row(inspection, tmp_path, monkeypatch):
    row = Statistic[BranchInDepth](
        name="write_weight",
        label="largest write weight",
        of_branch=lambda branch: branch.record.h_post.max().item(),
        of_model=max,
        format=".1f",
        line=8,
        total="{value} with {n} streams (largest of all branches)",
    )
    monkeypatch.setitem(STATISTICS, row.name, row)
    statistics = stream_statistics(inspection.records)
    keys = [row.name, *(f"{branch}/{row.name}" for branch in inspection.records)]
    assert {key: statistics[key] for key in keys} == dict.fromkeys(keys, 1.0)
    numbers = inspection.to_dict()
    assert numbers["total"][row.name] == 1
    assert [branch[row.name] for branch in numbers["branches"].values()] == [1, 1, 1]
    assert total_rows(inspection)[-1] == (row.label, "1.0 with 4 streams (largest of all branches)")
    assert f"hc/{row.name}" in logged(tmp_path)


def test_the_guide_names_what_is_shown():
    cells = first_cells("how-to/inspect.md")
    assert [f"`{name}`" for name in BRANCH_COLUMNS[1:3]] == cells[:2]
    shown = [row for row in STATISTICS.values() if row.column or row.line]

    def names(cell: str, row: Statistic) -> bool:
        return cell == row.column.replace("\n", " ") or row.label.startswith(cell)

    for row in shown:
        assert any(names(cell, row) for cell in cells), row.name
    for cell in cells[2:]:
        assert any(names(cell, row) for row in shown), cell


def test_the_page_on_training_names_what_is_logged():
    page = (DOCS / "training.md").read_text(encoding="utf-8")
    table = page.partition("| name | meaning | range |")[2].partition("\n\n")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, re.M)
    assert {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} == {*STATISTICS, GRADIENT_NORM.name}
