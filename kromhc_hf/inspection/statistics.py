"""Statistics of what the streams do, as pure functions of the recorded mappings."""

from collections.abc import Mapping, Sequence

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
    return (
        torch.stack([product.abs().sum(-1).amax() for product in forward]),
        torch.stack([product.abs().sum(-2).amax() for product in backward]),
    )


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


def branch_statistics(record: BranchRecord) -> dict[str, float]:
    """The statistics of one branch that need no other branch, as numbers."""
    return {
        "off_identity_mass": off_identity_mass(record.h_res).item(),
        "doubly_stochastic_error": doubly_stochastic_error(record.h_res),
        "read_entropy": read_entropy(record.h_pre).item(),
        "stream_spread": stream_spread(record.streams).item(),
        "stream_cosine": stream_cosine(record.streams).item(),
        "effective_num_streams": effective_num_streams(record.streams).item(),
    }


def stream_statistics(records: Mapping[str, BranchRecord]) -> dict[str, float]:
    """The statistics of a forward: `<name>` for the whole model and `<branch>/<name>` for every branch.

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
    per_branch = {name: branch_statistics(record) for name, record in records.items()}
    forward, backward = composite_gain([record.h_res for record in records.values()])
    for statistics, forward_gain, backward_gain in zip(per_branch.values(), forward.tolist(), backward.tolist()):
        statistics |= {"forward_gain": forward_gain, "backward_gain": backward_gain}
    values = list(per_branch.values())
    total = {name: sum(s[name] for s in values) / len(values) for name in values[0]}
    total["doubly_stochastic_error"] = max(s["doubly_stochastic_error"] for s in values)
    total["forward_gain"], total["backward_gain"] = values[-1]["forward_gain"], values[0]["backward_gain"]
    return total | {f"{branch}/{name}": value for branch, s in per_branch.items() for name, value in s.items()}
