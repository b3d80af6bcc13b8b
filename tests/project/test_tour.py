"""The notebook runs from its first cell to its last, and is kept with clean outputs."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient


TOUR = Path(__file__).resolve().parents[2] / "examples" / "tour.ipynb"


def test_the_tour_runs(tmp_path):
    notebook = nbformat.read(TOUR, as_version=4)
    # The cells assert what they show; an error in any of them is raised here.
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert (tmp_path / "report" / "report.html").stat().st_size > 100_000
    assert (tmp_path / "tuned" / "config.json").is_file()


def test_the_tour_is_kept_with_outputs_and_without_paths():
    notebook = nbformat.read(TOUR, as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/svg+xml" in output.get("data", {}) for output in outputs)
    assert {output.output_type for output in outputs} <= {"stream", "execute_result", "display_data"}
    for output in outputs:
        assert output.get("name") != "stderr"
        assert "/" not in output.get("text", "").replace("->", "")
