"""Statistics of what the streams do: pure functions, and one table of what is computed, shown and logged."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..modeling.mixing import doubly_stochastic_error
from .recording import BranchRecord


def off_identity_mass(h_res: Tensor) -> Tensor:
    """How much the streams mix: the mean over tokens and rows of what lies off the diagonal, in absolute value.

    0 for the identity, 1 for a permutation without fixed point, (n - 1) / n for uniform mixing.

    Args:
        h_res: `[..., n, n]`.
    """
    magnitude = h_res.abs()
    return (magnitude.sum((-2, -1)) - magnitude.diagonal(dim1=-2, dim2=-1).sum(-1)).mean() / h_res.shape[-1]


def composite_gain(h_res: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """How much the product of the mixing matrices over depth can amplify (mHC, arXiv 2512.24880, section 3.1).

    Exactly 1 for doubly stochastic matrices. The signal passes from branch 0 to branch l through
    `h_res[l] @ ... @ h_res[0]` and grows at most by the largest absolute row sum; the gradient passes from the last
    branch L back to branch l through the transpose of `h_res[L] @ ... @ h_res[l]` and grows at most by the largest
    absolute column sum.

    Args:
        h_res: one `[..., n, n]` per branch, in order.

    Returns:
        The forward gain up to each branch and the backward gain down to each branch, both `[branches]`, the largest
        over all tokens. `forward[-1]` and `backward[0]` are those of the whole depth.
    """
    forward, backward = composite_products(h_res)
    return torch.stack(list(map(forward_gain, forward))), torch.stack(list(map(backward_gain, backward)))


def forward_gain(product: Tensor) -> Tensor:
    """The largest absolute row sum of a product of mixing matrices `[..., n, n]`, over all tokens."""
    return product.abs().sum(-1).amax()


def backward_gain(product: Tensor) -> Tensor:
    """The largest absolute column sum of a product of mixing matrices `[..., n, n]`, over all tokens."""
    return product.abs().sum(-2).amax()


def composite_products(h_res: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The products of the mixing matrices over depth, each `[..., n, n]`.

    Args:
        h_res: one `[..., n, n]` per branch, in order.

    Returns:
        For each branch l, `h_res[l] @ ... @ h_res[0]` and `h_res[L] @ ... @ h_res[l]` with L the last branch.
    """
    forward, backward = [h_res[0]], [h_res[-1]]
    for matrix in h_res[1:]:
        forward.append(matrix @ forward[-1])
    for matrix in reversed(h_res[:-1]):
        backward.append(backward[-1] @ matrix)
    return forward, backward[::-1]


def read_entropy(h_pre: Tensor) -> Tensor:
    """How evenly a branch reads the streams: the entropy in nats of `h_pre` scaled to sum 1, mean over tokens.

    0 when one stream is read, log(n) when all are read alike.

    Args:
        h_pre: `[..., n]`.
    """
    magnitude = h_pre.abs()
    share = magnitude / magnitude.sum(-1, keepdim=True).clamp_min(torch.finfo(h_pre.dtype).tiny)
    return torch.special.entr(share).sum(-1).mean()


def stream_spread(streams: Tensor) -> Tensor:
    """How far apart the streams are: distance from their mean over their own size, both root mean square over n.

    0 for equal streams, 1 where the mean vanishes; mean over tokens.

    Args:
        streams: `[..., n, C]`.
    """
    wide = streams.float()
    distance = (wide - wide.mean(-2, keepdim=True)).square().sum((-2, -1))
    return (distance / wide.square().sum((-2, -1)).clamp_min(torch.finfo(wide.dtype).tiny)).sqrt().mean()


def stream_cosine(streams: Tensor) -> Tensor:
    """The cosine between two different streams, mean over pairs and tokens; 1 for equal streams, 0 for orthogonal ones.

    Args:
        streams: `[..., n, C]` with n of at least 2.
    """
    direction = torch.nn.functional.normalize(streams.float(), dim=-1)
    n = streams.shape[-2]
    return ((direction @ direction.mT).sum((-2, -1)) - direction.square().sum((-2, -1))).mean() / (n * (n - 1))


def effective_num_streams(streams: Tensor) -> Tensor:
    """How many streams carry information of their own: the participation ratio of their Gram matrix, mean over tokens.

    `tr(G)^2 / tr(G^2)` with `G = streams @ streams.T`: 1 for equal streams, n for orthogonal ones of equal length.

    Args:
        streams: `[..., n, C]`.
    """
    wide = streams.float()
    # Scaled first, so that fourth powers stay in range.
    wide = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)
    gram = wide @ wide.mT
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (trace.square() / gram.square().sum((-2, -1)).clamp_min(torch.finfo(wide.dtype).tiny)).mean()


def mean(values: Sequence[float]) -> float:
    """The mean over branches."""
    return sum(values) / len(values)


class BranchInDepth(NamedTuple):
    """A branch, and the products of `h_res` from the first branch to it and from it to the last, `[B, S, n, n]`."""

    record: BranchRecord
    forward_product: Tensor
    backward_product: Tensor


# What a statistic is computed of.
Source = TypeVar("Source")


@dataclass(frozen=True)
class Statistic(Generic[Source]):
    """One statistic: how it is computed, what it is called and how it is written, for every place that shows it.

    Args:
        name: its key in the log and in JSON.
        label: its name in words.
        of_branch: its value for one branch.
        of_model: its value for the model, from those of the branches in order.
        format: how its value is written, as a format specification.
        column: its heading in the table of the branches; empty if it has no column there.
        line: its place among the lines on the whole model, from the top; 0 if it has no line there.
        total: what that line says, with `{value}`, and `{n}` for the number of streams.
        curve: its name in a picture of several curves and on the axis of a picture.
        unit: on the axis of a picture.
        span: the least that this axis spans, so that rounding does not look like a signal.
    """

    name: str
    label: str
    of_branch: Callable[[Source], float]
    of_model: Callable[[Sequence[float]], float] = mean
    format: str = ".4f"
    column: str = ""
    line: int = 0
    total: str = "{value} (mean over branches)"
    curve: str = ""
    unit: str = "no unit"
    span: float = 0.0


# In the order of the log and of JSON.
STATISTICS: dict[str, Statistic[BranchInDepth]] = {
    row.name: row
    for row in (
        Statistic[BranchInDepth](
            name="off_identity_mass",
            label="off-identity mass",
            of_branch=lambda branch: off_identity_mass(branch.record.h_res).item(),
            format=".2%",
            column="off\nidentity",
            line=4,
            curve="off-identity mass",
            unit="share",
            span=0.01,
        ),
        Statistic[BranchInDepth](
            name="doubly_stochastic_error",
            label="doubly stochastic error",
            of_branch=lambda branch: doubly_stochastic_error(branch.record.h_res),
            of_model=max,
            format=".1e",
            column="sum\nerror",
            line=3,
            total="{value} (largest of all branches)",
        ),
        Statistic[BranchInDepth](
            name="read_entropy",
            label="entropy of read weights",
            of_branch=lambda branch: read_entropy(branch.record.h_pre).item(),
        ),
        Statistic[BranchInDepth](
            name="stream_spread",
            label="stream spread",
            of_branch=lambda branch: stream_spread(branch.record.streams).item(),
            column="spread",
            line=7,
            total="{value} of their size (mean over branches)",
            curve="spread",
            span=0.02,
        ),
        Statistic[BranchInDepth](
            name="stream_cosine",
            label="cosine between streams",
            of_branch=lambda branch: stream_cosine(branch.record.streams).item(),
            line=6,
            curve="cosine",
            span=0.02,
        ),
        Statistic[BranchInDepth](
            name="effective_num_streams",
            label="effective number of streams",
            of_branch=lambda branch: effective_num_streams(branch.record.streams).item(),
            format=".3f",
            line=5,
            total="{value} of {n} (mean over branches)",
            curve="effective number",
            unit="streams",
            span=0.05,
        ),
        Statistic[BranchInDepth](
            name="forward_gain",
            label="composite gain, forward",
            of_branch=lambda branch: forward_gain(branch.forward_product).item(),
            of_model=lambda values: values[-1],
            format=".6f",
            line=1,
            total="{value} (largest row sum of the product over depth)",
            curve="composite, forward",
            unit="factor",
            span=0.02,
        ),
        Statistic[BranchInDepth](
            name="backward_gain",
            label="composite gain, backward",
            of_branch=lambda branch: backward_gain(branch.backward_product).item(),
            of_model=lambda values: values[0],
            format=".6f",
            line=2,
            total="{value} (largest column sum)",
            curve="composite, backward",
            unit="factor",
            span=0.02,
        ),
    )
}


def stream_statistics(records: Mapping[str, BranchRecord]) -> dict[str, float]:
    """All of `STATISTICS` for a forward: `<name>` for the whole model and `<branch>/<name>` for every branch.

    In total, the doubly stochastic error is the largest of the branches, the gains are those of the whole depth and
    everything else is the mean.

    Args:
        records: what `record_mappings` yields, after a forward.

    Raises:
        ValueError: if nothing was recorded.
    """
    if not records:
        raise ValueError(
            "records must hold at least one branch; got none. Run the model inside the with block of record_mappings."
        )
    products = composite_products([record.h_res for record in records.values()])
    branches = map(BranchInDepth, records.values(), *products)
    return with_totals(STATISTICS.values(), dict(zip(records, branches)))


def with_totals(rows: Collection[Statistic[Source]], branches: Mapping[str, Source]) -> dict[str, float]:
    """Statistics of a model under `<name>`, and of every one of its branches under `<branch>/<name>`."""
    of_branches = {name: {row.name: row.of_branch(branch) for row in rows} for name, branch in branches.items()}
    of_model = {row.name: row.of_model([values[row.name] for values in of_branches.values()]) for row in rows}
    return of_model | {f"{name}/{key}": v for name, values in of_branches.items() for key, v in values.items()}
