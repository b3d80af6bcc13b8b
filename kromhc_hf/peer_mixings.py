"""The variants that KromHC is compared with: mHC, mHC-lite, TBP-mHC and unconstrained hyper-connections."""

from math import factorial

import torch
from torch import Tensor

from .mixing_base import SINKHORN_ITERATIONS, DenseMixing, permutation_mixture, uneven_weights, widest_dtype


LARGEST_MHC_LITE = 6
PAPER_HIDDEN_SIZE = 768


class MHCMixing(DenseMixing):
    """H_res = Sinkhorn-Knopp(n x n logits), rows and columns normalised in turn in log space (mHC, arXiv 2512.24880).

    The columns are normalised last and sum to 1 within rounding; the rows do so only as far as the iterations have
    converged: with 20 iterations and logits of standard deviation 1, 4, 8 they miss by 4e-4, .07, .2. The initial
    matrix is symmetric, converges at once and is lossless.
    """

    def __init__(self, num_streams: int, sinkhorn_iterations: int = SINKHORN_ITERATIONS):
        super().__init__(num_streams, sinkhorn_iterations)
        self.num_logits = num_streams**2

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

    rows_sum_to_one = True

    def __init__(self, num_streams: int, sinkhorn_iterations: int = SINKHORN_ITERATIONS):
        super().__init__(num_streams, sinkhorn_iterations)
        self.num_logits = factorial(num_streams) - 1
        if num_streams > LARGEST_MHC_LITE:
            rows, width = self.weight_shape(PAPER_HIDDEN_SIZE)
            raise ValueError(
                f"num_streams must be at most {LARGEST_MHC_LITE} with variant 'mhc_lite', which has a logit for each "
                f"of the n! permutations; got {num_streams}, which would take {rows * width:,} parameters per branch "
                f"at a hidden size of {PAPER_HIDDEN_SIZE}. Use variant='kromhc'."
            )

    def initial_logits(self, residual_logit: float) -> Tensor:
        return torch.full((self.num_logits,), -residual_logit, dtype=torch.float32)

    def matrix(self, logits: Tensor) -> Tensor:
        return permutation_mixture(logits, self.num_streams)


class TBPMixing(DenseMixing):
    """H_res from a chart of the transportation polytope, (n - 1)^2 logits (TBP-mHC, arXiv 2605.21724).

    Entries are filled row by row, each at `sigmoid(logit)` of the interval that the row and column sums leave for it;
    the last row and column take what remains. Exact for any n, with the fewest logits that cover the whole polytope,
    but the (n - 1)^2 steps depend on each other.
    """

    rows_sum_to_one = True

    def __init__(self, num_streams: int, sinkhorn_iterations: int = SINKHORN_ITERATIONS):
        super().__init__(num_streams, sinkhorn_iterations)
        self.num_logits = (num_streams - 1) ** 2

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

    plain_gates = False

    def __init__(self, num_streams: int, sinkhorn_iterations: int = SINKHORN_ITERATIONS):
        super().__init__(num_streams, sinkhorn_iterations)
        self.num_logits = num_streams**2

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
