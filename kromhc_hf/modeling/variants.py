# Code of kromhc-hf, which travels with every model that it saves.
"""Every variant, that is every parametrisation of the stream mixing matrix H_res: a class each, and their table.

A mixing turns a vector of unconstrained logits into a matrix `h_res` and applies it to the streams,
`mixed[i] = sum_j h_res[i, j] streams[j]`. It holds no parameters: the hyper-connection does.
"""

import functools
from itertools import permutations
from math import factorial

import torch
import torch.nn.functional as F
from torch import Tensor

from .mixing import SINKHORN_ITERATIONS, DenseMixing, Mixing, uneven_weights


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
    product = left[..., :, None, :, None] * right[..., None, :, None, :]
    return product.reshape(*left.shape[:-2], size, size)


def permutation_mixture(logits: Tensor, size: int) -> Tensor:
    """A convex combination of all permutation matrices, `[..., size! - 1]` -> `[..., size, size]`.

    The logits belong to the permutations after the identity, whose logit is 0, in the order of
    `itertools.permutations`; a permutation `order` takes row i to column `order[i]`.
    """
    # Sums of hundreds of weights miss 1 by several eps in fp32.
    wide = widest_dtype(logits)
    weights = torch.softmax(F.pad(logits, (1, 0)), dim=-1, dtype=wide)
    orders = torch.tensor(list(permutations(range(size))), device=logits.device)
    mixture = weights @ F.one_hot(orders, size).flatten(1).to(wide)
    return mixture.to(logits.dtype).unflatten(-1, (size, size))


def widest_dtype(tensor: Tensor) -> torch.dtype:
    """float64, where the device has it: for sums over many entries of a small matrix."""
    return tensor.dtype if tensor.device.type == "mps" else torch.float64


class IdentityMixing(Mixing):
    """H_res = I: the streams keep to themselves, only reading and writing is learned."""

    doubly_stochastic = "exactly"

    @staticmethod
    def count_logits(num_streams: int) -> int:
        return 0

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


class MHCMixing(DenseMixing):
    """H_res = Sinkhorn-Knopp(n x n logits), rows and columns normalised in turn in log space (mHC, arXiv 2512.24880).

    The columns are normalised last and sum to 1 within rounding; the rows do so only as far as the iterations have
    converged: with 20 iterations and logits of standard deviation 1, 4, 8 they miss by 4e-4, .07, .2. The initial
    matrix is symmetric, converges at once and is lossless.
    """

    doubly_stochastic = "by iteration"

    def initial_logits(self, residual_logit: float) -> Tensor:
        return -residual_logit * (1 - torch.eye(self.num_streams, dtype=torch.float32)).flatten()

    def matrix(self, logits: Tensor) -> Tensor:
        log_h_res = logits.unflatten(-1, (self.num_streams, self.num_streams))
        for _ in range(self.sinkhorn_iterations):
            log_h_res = log_h_res - log_h_res.logsumexp(-1, keepdim=True)
            log_h_res = log_h_res - log_h_res.logsumexp(-2, keepdim=True)
        return log_h_res.exp()


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
        return permutation_mixture(logits, self.num_streams)


class TBPMixing(DenseMixing):
    """H_res from a chart of the transportation polytope, (n - 1)^2 logits (TBP-mHC, arXiv 2605.21724).

    Entries are filled row by row, each at `sigmoid(logit)` of the interval that the row and column sums leave for it;
    the last row and column take what remains. Exact for any n, with the fewest logits that cover the whole polytope,
    but the (n - 1)^2 steps depend on each other.
    """

    doubly_stochastic = "exactly"

    @staticmethod
    def count_logits(num_streams: int) -> int:
        return (num_streams - 1) ** 2

    def initial_logits(self, residual_logit: float) -> Tensor:
        return residual_logit * (2 * torch.eye(self.num_streams - 1, dtype=torch.float32) - 1).flatten()

    def matrix(self, logits: Tensor) -> Tensor:
        last = self.num_streams - 1
        # What remains at the end has the rounding of all steps in it.
        share = torch.sigmoid(logits.to(widest_dtype(logits))).unflatten(-1, (last, last))
        one = torch.ones_like(share[..., :1].sum((-2, -1)))
        columns = [one] * self.num_streams  # what each column can still take
        rows = []
        for i in range(last):
            row, left = [], one
            for j in range(last):
                # A later row can always take the rest of a column, so only the row bounds an entry from below.
                low = (left - torch.stack(columns[j + 1 :]).sum(0)).clamp_min(0)
                entry = torch.lerp(low, torch.minimum(left, columns[j]), share[..., i, j])
                # Rounding may overdraw by an ulp.
                left, columns[j] = (left - entry).clamp_min(0), (columns[j] - entry).clamp_min(0)
                row.append(entry)
            columns[last] = (columns[last] - left).clamp_min(0)
            rows.append(torch.stack([*row, left], dim=-1))
        return torch.stack([*rows, torch.stack(columns, dim=-1)], dim=-2).to(logits.dtype)


class HCMixing(DenseMixing):
    """H_res = any matrix: hyper-connections without a constraint (HC, arXiv 2409.19606, eq. 10-13).

    Each stream predicts its own read weight, write weight and column of `h_res` through a weight of width C that all
    streams share, and a tanh; nothing is bounded or normalised. It starts at H_res = I whatever the residual logit.
    """

    doubly_stochastic = "no"
    plain_gates = False

    def initial_logits(self, residual_logit: float) -> Tensor:
        return torch.eye(self.num_streams, dtype=torch.float32).flatten()

    def matrix(self, logits: Tensor) -> Tensor:
        return logits.unflatten(-1, (self.num_streams, self.num_streams))

    def initial_bias(self, init: str, branch_index: int, residual_logit: float) -> Tensor:
        favoured = torch.arange(self.num_streams) == branch_index % self.num_streams
        pre = favoured.float() if init == "paper" else uneven_weights(favoured).float()
        return torch.cat([pre, torch.ones_like(pre), self.initial_logits(residual_logit)])

    def weight_shape(self, hidden_size: int) -> tuple[int, int]:
        return 2 + self.num_streams, hidden_size

    def predict(self, products: Tensor, scale: Tensor) -> Tensor:
        per_stream = torch.tanh(products * scale)  # [..., n, 2 + n]
        pre, post, column = per_stream[..., 0], per_stream[..., 1], per_stream[..., 2:]
        return torch.cat([pre, post, column.transpose(-1, -2).flatten(-2)], dim=-1)

    def gates(self, pre: Tensor, post: Tensor) -> tuple[Tensor, Tensor]:
        return pre, post


def make_mixing(variant: str, num_streams: int, sinkhorn_iterations: int = SINKHORN_ITERATIONS) -> Mixing:
    """The mixing of a variant by name.

    Raises:
        ValueError: if the variant is unknown or not defined for this number of streams.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}; got {variant!r}.")
    return VARIANTS[variant](num_streams, sinkhorn_iterations)


VARIANTS: dict[str, type[Mixing]] = {
    "kromhc": KromHCMixing,
    "identity": IdentityMixing,
    "mhc": MHCMixing,
    "mhc_lite": MHCLiteMixing,
    "tbp": TBPMixing,
    "hc": HCMixing,
}
