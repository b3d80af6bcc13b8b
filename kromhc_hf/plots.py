"""Pictures of what the streams do."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from .inspection import BranchRecord, off_identity_mass


def require_matplotlib() -> None:
    """Says how to get matplotlib where it is missing.

    Raises:
        ValueError: with the command.
    """
    if find_spec("matplotlib") is None:
        raise ValueError('pictures need matplotlib, which is not installed. Use pip install "kromhc-hf[plots]".')


def plot_mixing(records: Mapping[str, BranchRecord], path: Path) -> None:
    """Draws the mean mixing matrix of every branch as a heat map, one panel per branch, into an image file.

    Args:
        records: what `record_mappings` recorded.
        path: image file; its suffix decides the format.

    Raises:
        ValueError: if matplotlib is not installed, or nothing was recorded.
    """
    require_matplotlib()
    if not records:
        raise ValueError("records must hold at least one branch; got none. Run the model inside record_mappings.")
    from matplotlib.figure import Figure

    columns = min(len(records), 4)
    rows = -(-len(records) // columns)
    figure = Figure(figsize=(2.6 * columns + 1, 2.9 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel, (name, record) in zip(panels.flat, records.items()):
        mean = record.h_res.float().mean((0, 1))
        image = panel.imshow(mean.numpy(), vmin=0, vmax=1, cmap="viridis")
        for i, row in enumerate(mean.tolist()):
            for j, value in enumerate(row):
                panel.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
        panel.set_title(f"{name}\noff identity {off_identity_mass(record.h_res):.1%}", fontsize=9)
        panel.set_xticks(range(len(mean)))
        panel.set_yticks(range(len(mean)))
        panel.set_xlabel("from stream", fontsize=8)
        panel.set_ylabel("to stream", fontsize=8)
    for panel in panels.flat[len(records) :]:
        panel.axis("off")
    figure.colorbar(image, ax=panels, shrink=0.6, label="weight, mean over tokens")
    figure.suptitle("Mixing matrices H_res, branch by branch")
    figure.savefig(path, dpi=120)
