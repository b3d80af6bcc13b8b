# Code of kromhc-hf, which travels with every model that it saves.
"""Variants whose H_res is a convex combination of permutation matrices, or a Kronecker product of such factors."""

import functools
from collections.abc import Iterable, Sequence
from itertools import permutations
from math import factorial

import torch
import torch.nn.functional as F
from torch import Tensor

from .known_values import keeps, kept, number
from .mixing import DenseMixing, Mixing, widest_dtype
from .option_table import SINKHORN_ITERATIONS


# The largest factor of KromHC and the most streams of mHC-lite: both learn a logit for every permutation.
LARGEST_FACTOR, LARGEST_MHC_LITE = 5, 6
PAPER_HIDDEN_SIZE = 768


def prime_factors(number: int) -> tuple[int, ...]:
    """The prime factors of `number` in ascending order, with multiplicity: 12 -> (2, 2, 3), 1 -> ()."""
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return tuple(factors)


def kronecker(left: Tensor, right: Tensor) -> Tensor:
    """The Kronecker product of the last two dimensions: `[..., i, i]` and `[..., j, j]` -> `[..., ij, ij]`."""
    size = left.shape[-1] * right.shape[-1]
    product = left.unsqueeze(-1).unsqueeze(-3) * right.unsqueeze(-2).unsqueeze(-4)
    return product.reshape(*left.shape[:-2], size, size)


def permutation_mixture(logits: Tensor, orders: Iterable[Sequence[int]]) -> Tensor:
    """A convex combination of permutation matrices, `[..., orders - 1]` -> `[..., size, size]`.

    The logits belong to the permutations after the first, the identity, whose logit is 0; a permutation `order` takes
    row i to column `order[i]`.
    """
    # Sums of hundreds of weights miss 1 by several eps in fp32.
    wide = widest_dtype(logits)
    weights = torch.softmax(F.pad(logits, (1, 0)), dim=-1, dtype=wide)
    columns = torch.tensor(list(orders), device=logits.device)
    size = columns.shape[-1]
    mixture = weights @ F.one_hot(columns, size).flatten(1).to(wide)
    return mixture.to(logits.dtype).unflatten(-1, (size, size))


def _make_factors_of_two(count: int, dtype: torch.dtype) -> Tensor:
    """How the factors of size 2 enter each entry of their Kronecker product, `[2, count, 4**count]`.

    The factor is the first number plus the second times `swap`: `swap` where the digits of row and column differ, and
    `1 - swap` elsewhere.
    """
    places = torch.arange(count - 1, -1, -1, device="cpu").unsqueeze(-1)
    digits = torch.arange(1 << count, device="cpu") >> places & 1
    differ = (digits.unsqueeze(-1) != digits.unsqueeze(-2)).flatten(1).to(dtype)
    return torch.stack([1 - differ, 2 * differ - 1])


class KromHCMixing(Mixing):
    """H_res = U_1 (x) ... (x) U_K, one doubly stochastic factor per prime factor of n (KromHC, arXiv 2601.21579).

    Each factor is a convex combination of the i! permutation matrices of its size i. The identity's logit is pinned
    to 0, which keeps the same set of matrices with i! - 1 logits per factor. The first factor is the most significant
    digit of the stream index. Rows and columns sum to 1 within 2 K eps, and equal streams stay bitwise equal.

    Raises:
        ValueError: if n has a prime factor above 5, whose i! permutations would be too many to learn.
    """

    doubly_stochastic = "exactly"

    def __init__(self, num_streams: int, sinkhorn_iterations: int = SINKHORN_ITERATIONS):
        super().__init__(num_streams, sinkhorn_iterations)
        # Not cached properties, whose lock torch.compile cannot enter.
        self.factors = prime_factors(num_streams)
        self.logits_per_factor = tuple(factorial(size) - 1 for size in self.factors)
        self.twos = self.factors.count(2)

    @staticmethod
    def count_logits(num_streams: int) -> int:
        return sum(factorial(size) - 1 for size in prime_factors(num_streams))

    @staticmethod
    def check_defined_for(num_streams: int) -> None:
        largest = max(prime_factors(num_streams), default=1)
        if largest > LARGEST_FACTOR:
            nearest = min(
                (n for n in range(1, 2 * num_streams) if max(prime_factors(n), default=1) <= LARGEST_FACTOR),
                key=lambda n: (abs(n - num_streams), -n),
            )
            raise ValueError(
                f"num_streams must have no prime factor above {LARGEST_FACTOR} with variant 'kromhc', since a factor "
                f"of size {largest} mixes {largest}! permutation matrices; got {num_streams}. "
                f"Use num_streams={nearest}."
            )

    def mix(self, streams: Tensor, logits: Tensor) -> Tensor:
        if not self.factors:
            return streams
        # Mixing is written as x + sum_shift weight * (shifted x - x), so that equal streams are not even rounded.
        mixed = streams.reshape(*streams.shape[:-2], *self.factors, streams.shape[-1])  # [..., i_1, ..., i_K, C]
        ones = (1,) * (len(self.factors) + 1)
        if self.twos:
            swaps = torch.sigmoid(self._of_twos(logits))
            for dim, swap in enumerate(swaps.view(*swaps.shape, *ones).unbind(-len(ones) - 1), start=-len(ones)):
                mixed = torch.lerp(mixed, mixed.flip(dim), swap)
        for position, factor_logits in self._larger_factors(logits):
            size, dim, source = self.factors[position], position - len(ones), mixed
            factor = permutation_mixture(factor_logits, permutations(range(size)))
            rows = torch.arange(size, device=logits.device)
            for shift in range(1, size):
                weight = factor[..., rows, (rows + shift) % size]
                weight = weight.reshape(*weight.shape[:-1], *(1,) * position, size, *(1,) * (-dim - 1))
                mixed = torch.addcmul(mixed, weight, source.roll(-shift, dim) - source)
        return mixed.flatten(-len(ones), -2)

    def _of_twos(self, logits: Tensor) -> Tensor:
        """The logits of the factors of size 2."""
        return logits if self.twos == self.num_logits else logits[..., : self.twos]

    def _larger_factors(self, logits: Tensor) -> list[tuple[int, Tensor]]:
        """The positions and logits of the factors after those of size 2; factors are in ascending order."""
        if self.twos == len(self.factors):
            return []
        parts = logits[..., self.twos :].split(self.logits_per_factor[self.twos :], -1)
        return list(enumerate(parts, start=self.twos))

    def matrix(self, logits: Tensor) -> Tensor:
        if not self.factors:
            return logits.new_ones(*logits.shape[:-1], 1, 1)
        swap = torch.sigmoid(self._of_twos(logits))
        factors = []
        if keeps(swap) and self.twos > 1 and not swap.requires_grad:
            # Entries are products of `swap` or `1 - swap` of each factor; a matrix of each takes more operations.
            # Not for a gradient: where streams are equal, its terms cancel exactly in the order of those matrices.
            at_zero, slope = kept(_make_factors_of_two, self.twos, swap.dtype).unbind()
            entries = torch.addcmul(at_zero, slope, swap.unsqueeze(-1)).unbind(-2)
            factors = [functools.reduce(torch.mul, entries).unflatten(-1, (1 << self.twos, 1 << self.twos))]
        elif self.twos:
            keep = number(1, swap) - swap
            factors = list(torch.stack([keep, swap, swap, keep], dim=-1).view(*swap.shape, 2, 2).unbind(-3))
        factors += [
            permutation_mixture(part, permutations(range(self.factors[position])))
            for position, part in self._larger_factors(logits)
        ]
        return functools.reduce(kronecker, factors)


class MHCLiteMixing(DenseMixing):
    """H_res = a convex combination of all n! permutation matrices (mHC-lite, arXiv 2601.05732, Birkhoff-von Neumann).

    Every doubly stochastic matrix can be reached, and nothing else. The identity's logit is pinned to 0.

    Raises:
        ValueError: above n = 6, with the number of parameters that the permutations would take.
    """

    doubly_stochastic = "exactly"

    @staticmethod
    def count_logits(num_streams: int) -> int:
        return factorial(num_streams) - 1

    @staticmethod
    def check_defined_for(num_streams: int) -> None:
        if num_streams > LARGEST_MHC_LITE:
            outputs = 2 * num_streams + MHCLiteMixing.count_logits(num_streams)
            parameters = outputs * num_streams * PAPER_HIDDEN_SIZE
            raise ValueError(
                f"num_streams must be at most {LARGEST_MHC_LITE} with variant 'mhc_lite', which has a logit for each "
                f"of the n! permutations; got {num_streams}, which would take {parameters:,} parameters per branch "
                f"at a hidden size of {PAPER_HIDDEN_SIZE}. Use variant='kromhc'."
            )

    def matrix(self, logits: Tensor) -> Tensor:
        return permutation_mixture(logits, permutations(range(self.num_streams)))


class CirculantMixing(DenseMixing):
    """H_res = sum_k c_k P^k, a convex combination of the n cyclic shifts of the streams (C-mHC).

    `P` takes row i to column i + 1, so that new stream i has the share c_k of stream i + k. The logit of the shift by 0
    is pinned to 0. All such matrices commute; which stream a share comes from counts, not between which two it goes.
    """

    doubly_stochastic = "exactly"

    @staticmethod
    def count_logits(num_streams: int) -> int:
        return num_streams - 1

    def matrix(self, logits: Tensor) -> Tensor:
        n = self.num_streams
        return permutation_mixture(logits, ([(row + shift) % n for row in range(n)] for shift in range(n)))
