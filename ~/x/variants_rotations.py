# Code of kromhc-hf, which travels with every model that it saves.
"""Variants whose H_res comes from a rotation, made of a skew-symmetric matrix by the Cayley transform."""

from math import exp, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from .mixing import DenseMixing, widest_dtype


def count_pairs(size: int) -> int:
    """How many entries a matrix of this size has above its diagonal."""
    return size * (size - 1) // 2


def cayley(entries: Tensor, size: int) -> Tensor:
    """The rotation `Q = (I + A)^-1 (I - A)`, `[..., size (size - 1) / 2]` -> `[..., size, size]`, in `widest_dtype`.

    The entries are those of `A` above the diagonal, row by row; those below are their negatives. `I + A` always has an
    inverse, which lengthens nothing, and the two commute. `A = 0` gives exactly `I`.
    """
    wide = entries.to(widest_dtype(entries))
    column = torch.arange(size, device=wide.device)
    row = column.unsqueeze(1)
    # Where the entries above the diagonal stand, counted from 1; the other places are within range.
    place = row * (2 * size - row - 3) // 2 + column
    upper = F.pad(wide, (1, 0)).index_select(-1, place.flatten()).unflatten(-1, place.shape).triu(1)
    skew = upper - upper.mT
    identity = torch.eye(size, dtype=wide.dtype, device=wide.device)
    # Not `solve`, which waits for a GPU to ask whether there is an inverse.
    return torch.linalg.solve_ex(identity + skew, identity - skew).result


class OrthogonalMixing(DenseMixing):
    """H_res = (I + A)^-1 (I - A) with A skew-symmetric, a rotation of the streams (JPmHC; oHC for n = 4).

    The streams keep their length, whatever the logits, n (n - 1) / 2 of them; rows and columns need not sum to 1. Equal
    streams stay equal at the identity alone: it starts exactly there, at A = 0, whatever the residual logit.
    """

    doubly_stochastic = "no"

    @staticmethod
    def count_logits(num_streams: int) -> int:
        return count_pairs(num_streams)

    def initial_logits(self, residual_logit: float) -> Tensor:
        return torch.zeros(self.num_logits, dtype=torch.float32)

    def matrix(self, logits: Tensor) -> Tensor:
        return cayley(logits, self.num_streams).to(logits.dtype)


class GoMHCMixing(DenseMixing):
    """H_res[i, j] = 1 / s times the sum of the squares in block (i, j) of a rotation Q of size n s (go-mHC).

    A generalised orthostochastic matrix (arXiv 2604.02309) with s = 2: rows and columns of Q have length 1, so that
    those of `h_res` sum to 1. It has n (2 n - 1) logits, the entries of a skew-symmetric matrix before the Cayley
    transform. At 0 they give the identity with a gradient of zero, so they start at a size that mixes as
    `residual_logit` says, off the diagonal about `exp(-residual_logit)`, and in signs that alternate, so that they do
    not add up along a row.
    """

    doubly_stochastic = "exactly"
    BLOCK = 2

    @staticmethod
    def count_logits(num_streams: int) -> int:
        return count_pairs(GoMHCMixing.BLOCK * num_streams)

    def initial_logits(self, residual_logit: float) -> Tensor:
        # Q is about I - 2 A: an entry off the diagonal is the sum of four squares of 2 times a logit, divided by 2.
        size = exp(-residual_logit / 2) / sqrt(4 * self.BLOCK)
        signs = 1 - 2 * (torch.arange(self.num_logits) % 2)
        return size * signs.to(torch.float32)

    def matrix(self, logits: Tensor) -> Tensor:
        n, s = self.num_streams, self.BLOCK
        squares = cayley(logits, n * s).square().unflatten(-1, (n, s)).unflatten(-3, (n, s))  # [..., n, s, n, s]
        return (squares.sum((-3, -1)) / s).to(logits.dtype)
