"""Parametrisations of the stream mixing matrix H_res: one small class per variant.

A mixing turns a vector of unconstrained logits into a matrix `h_res` and applies it to the streams,
`mixed[i] = sum_j h_res[i, j] streams[j]`. It holds no parameters: the logits are computed by the hyper-connection.
"""

import functools
from math import factorial

import torch
from torch import Tensor

from .mixing_base import SINKHORN_ITERATIONS, Mixing, permutation_mixture
from .peer_mixings import HCMixing, MHCLiteMixing, MHCMixing, TBPMixing


LARGEST_FACTOR = 5


def prime_factors(number: int) -> tuple[int, ...]:
    """The prime factors of `number` in ascending order, with multiplicity: 12 -> (2, 2, 3), 1 -> ()."""
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return tuple(factors)


def doubly_stochastic_error(matrix: Tensor) -> float:
    """How far `matrix` is from doubly stochastic: 0 for a matrix with row and column sums 1 and no negative entry.

    The largest of |row sum - 1|, |column sum - 1| and -entry, over all matrices of the batch, summed in float64.

    Args:
        matrix: `[..., n, n]`.

    Raises:
        ValueError: if the last two dimensions are not square.
    """
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"matrix must be square, [..., n, n]; got shape {tuple(matrix.shape)}.")
    exact = matrix.detach().double()
    rows = (exact.sum(-1) - 1).abs().max()
    columns = (exact.sum(-2) - 1).abs().max()
    return max(rows.item(), columns.item(), -exact.min().item(), 0.0)


class IdentityMixing(Mixing):
    """H_res = I: the streams keep to themselves, only reading and writing is learned."""

    rows_sum_to_one = True
    num_logits = 0

    def initial_logits(self, residual_logit: float) -> Tensor:
        return torch.zeros(0, dtype=torch.float32)

    def mix(self, streams: Tensor, logits: Tensor) -> Tensor:
        return streams


class KromHCMixing(Mixing):
    """H_res = U_1 (x) ... (x) U_K, one doubly stochastic factor per prime factor of n (KromHC, arXiv 2601.21579).

    Each factor is a convex combination of the i! permutation matrices of its size i. The identity's logit is pinned
    to 0, which keeps the same set of matrices with i! - 1 logits per factor. The first factor is the most significant
    digit of the stream index. Rows and columns sum to 1 within 2 K eps, and equal streams stay bitwise equal.

    Raises:
        ValueError: if n has a prime factor above 5, whose i! permutations would be too many to learn.
    """

    rows_sum_to_one = True

    def __init__(self, num_streams: int, sinkhorn_iterations: int = SINKHORN_ITERATIONS):
        super().__init__(num_streams, sinkhorn_iterations)
        self.factors = prime_factors(num_streams)
        if self.factors and self.factors[-1] > LARGEST_FACTOR:
            largest = self.factors[-1]
            raise ValueError(
                f"num_streams must have no prime factor above {LARGEST_FACTOR} with variant 'kromhc', since a factor "
                f"of size {largest} mixes {largest}! permutation matrices; got {num_streams}. "
                f"Use num_streams={self._nearest(num_streams)}."
            )
        self.logits_per_factor = tuple(factorial(size) - 1 for size in self.factors)
        self.num_logits = sum(self.logits_per_factor)
        self.twos = self.factors.count(2)

    @staticmethod
    def _nearest(num_streams: int) -> int:
        return min(
            (n for n in range(1, 2 * num_streams) if max(prime_factors(n), default=1) <= LARGEST_FACTOR),
            key=lambda n: (abs(n - num_streams), -n),
        )

    def initial_logits(self, residual_logit: float) -> Tensor:
        return torch.full((self.num_logits,), -residual_logit, dtype=torch.float32)

    def mix(self, streams: Tensor, logits: Tensor) -> Tensor:
        if not self.factors:
            return streams
        # Mixing is written as x + sum_shift weight * (shifted x - x), so that equal streams are not even rounded.
        mixed = streams.reshape(*streams.shape[:-2], *self.factors, streams.shape[-1])  # [..., i_1, ..., i_K, C]
        ones = (1,) * (len(self.factors) + 1)
        if self.twos:
            swaps = torch.sigmoid(logits[..., : self.twos])
            swaps = swaps.view(*swaps.shape, *ones)
            for position in range(self.twos):
                flipped = mixed.flip(position - len(ones))
                mixed = torch.addcmul(mixed, swaps.select(-len(ones) - 1, position), flipped - mixed)
        for position, factor_logits in self._larger_factors(logits):
            size, dim, source = self.factors[position], position - len(ones), mixed
            factor = permutation_mixture(factor_logits, size)
            rows = torch.arange(size, device=logits.device)
            for shift in range(1, size):
                weight = factor[..., rows, (rows + shift) % size]
                weight = weight.reshape(*weight.shape[:-1], *(1,) * position, size, *(1,) * (-dim - 1))
                mixed = torch.addcmul(mixed, weight, source.roll(-shift, dim) - source)
        return mixed.flatten(-len(ones), -2)

    def _larger_factors(self, logits: Tensor) -> list[tuple[int, Tensor]]:
        """The positions and logits of the factors after those of size 2; factors are in ascending order."""
        if self.twos == len(self.factors):
            return []
        parts = logits[..., self.twos :].split(self.logits_per_factor[self.twos :], -1)
        return list(enumerate(parts, start=self.twos))

    def matrix(self, logits: Tensor) -> Tensor:
        if not self.factors:
            return logits.new_ones(*logits.shape[:-1], 1, 1)
        swap = torch.sigmoid(logits[..., : self.twos])
        keep = 1 - swap
        factors = list(torch.stack([keep, swap, swap, keep], dim=-1).view(*swap.shape, 2, 2).unbind(-3))
        factors += [
            permutation_mixture(part, self.factors[position]) for position, part in self._larger_factors(logits)
        ]
        return functools.reduce(kronecker, factors)


def kronecker(left: Tensor, right: Tensor) -> Tensor:
    """The Kronecker product of the last two dimensions: `[..., i, i]` and `[..., j, j]` -> `[..., ij, ij]`."""
    size = left.shape[-1] * right.shape[-1]
    product = left[..., :, None, :, None] * right[..., None, :, None, :]
    return product.reshape(*left.shape[:-2], size, size)


VARIANTS: dict[str, type[Mixing]] = {
    "kromhc": KromHCMixing,
    "identity": IdentityMixing,
    "mhc": MHCMixing,
    "mhc_lite": MHCLiteMixing,
    "tbp": TBPMixing,
    "hc": HCMixing,
}


def make_mixing(variant: str, num_streams: int, sinkhorn_iterations: int = SINKHORN_ITERATIONS) -> Mixing:
    """The mixing of a variant by name.

    Raises:
        ValueError: if the variant is unknown or not defined for this number of streams.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}; got {variant!r}.")
    return VARIANTS[variant](num_streams, sinkhorn_iterations)
