"""The mixing matrices of all branches, each with its axes or, of many, layer by layer; the odd ones marked."""

from collections.abc import Mapping
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .page import Picture
from .plots import frame, matrix_figure
from .tables import layer_and_kind, short_name
from .themed_svg import INK


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# So many branches have axes and numbers of their own; of more, nobody would see the whole.
MOST_LARGE = 16
# How far from the median a branch must be to be marked: in a share of a stream, and in the usual distance.
ODD_SHARE, ODD_RATIO = 0.01, 3.0
MOST_NAMED = 4


def odd_ones_out(matrices: Mapping[str, Tensor]) -> dict[str, float]:
    """The branches that mix unlike the others, the oddest first, with their distance.

    The distance of a branch is the share of a stream that comes from elsewhere than at the median of all branches: half
    of the absolute row sum of the difference, mean over rows. Odd is what is more than three times as far away as half
    of the branches are, and more than 1 %.

    Args:
        matrices: `[n, n]` by branch.
    """
    every = torch.stack(list(matrices.values()))
    distances = (every - every.median(0).values).abs().sum(-1).mean(-1) / 2
    least = max(ODD_SHARE, ODD_RATIO * distances.median().item())
    found = {name: distance for name, distance in zip(matrices, distances.tolist()) if distance > least}
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def said_of_odd_ones(odd: Mapping[str, float]) -> str:
    """A sentence on the branches that are marked; empty if there is none."""
    if not odd:
        return ""
    named = [f"{short_name(name)} ({distance:.1%})" for name, distance in list(odd.items())[:MOST_NAMED]]
    more = f" and {len(odd) - len(named)} more" if len(odd) > len(named) else ""
    return (
        f"Framed, since unlike the others: {', '.join(named)}{more}, in brackets by what share of a stream they differ "
        "from the median of all branches."
    )


def branch_pictures(
    what: str, matrices: Mapping[str, Tensor], limits: tuple[float, float], colours: str, framed: Mapping[str, float]
) -> list[Picture]:
    """Pictures of a matrix of every branch: one each, or, of more than 16, one per layer.

    Args:
        what: what the matrices are.
        matrices: `[n, n]` by branch, in order.
        limits, colours: of their colour scale.
        framed: the branches to mark.
    """
    if len(matrices) <= MOST_LARGE:
        return [
            Picture(
                "small",
                f"{what}, {short_name(name)}",
                partial(matrix_figure, matrix, short_name(name), limits, colours, name in framed),
            )
            for name, matrix in matrices.items()
        ]
    pictures = []
    for layer, group in groupby(matrices, key=lambda name: layer_and_kind(name)[0]):
        names = list(group)
        kinds = [layer_and_kind(name)[1] for name in names]
        marks = [name in framed for name in names]
        draw = partial(layer_figure, layer, kinds, [matrices[name] for name in names], limits, colours, marks)
        pictures.append(Picture("tiny", f"{what}, layer {layer}: {', '.join(kinds)}", draw))
    return pictures


def layer_figure(
    layer: str,
    kinds: list[str],
    matrices: list[Tensor],
    limits: tuple[float, float],
    colours: str,
    framed: list[bool],
) -> "Figure":
    """The matrices of one layer under each other, `[n, n]` each, with no more text than layer and kind."""
    from matplotlib.figure import Figure

    width, side, left, top = 0.78, 0.58, 0.17, 0.2
    height = top + (side + 0.06) * len(matrices)
    # Without a layout, which takes longer than to draw.
    figure = Figure(figsize=(width, height))
    for i, (kind, matrix, marked) in enumerate(zip(kinds, matrices, framed)):
        bottom = height - top - side - i * (side + 0.06)
        panel = figure.add_axes((left / width, bottom / height, side / width, side / height))
        panel.pcolormesh(matrix.numpy(), vmin=limits[0], vmax=limits[1], cmap=colours, edgecolors="face")
        panel.invert_yaxis()
        panel.set(xticks=[], yticks=[])
        panel.set_ylabel(kind, fontsize=8, color=INK, labelpad=2)
        for spine in panel.spines.values():
            spine.set_visible(False)
        if i == 0:
            panel.set_title(layer, fontsize=8, color=INK, pad=2)
        if marked:
            frame(panel)
    return figure
