# Code of kromhc-hf, which travels with every model that it saves.
"""Every variant, that is every parametrisation of the stream mixing matrix H_res: a class each, and their table.

A mixing turns a vector of unconstrained logits into a matrix `h_res` and applies it to the streams,
`mixed[i] = sum_j h_res[i, j] streams[j]`. It holds no parameters: the hyper-connection does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .mixing import DenseMixing, Mixing, uneven_weights, widest_dtype
from .option_table import SINKHORN_ITERATIONS
from .variants_permutations import CirculantMixing, KromHCMixing, MHCLiteMixing
from .variants_rotations import GoMHCMixing, OrthogonalMixing


class IdentityMixing(Mixing):
    """H_res = I: the streams keep to themselves, only reading and writing is learned."""

    doubly_stochastic = "exactly"

    @staticmethod
    def count_logits(num_streams: int) -> int:
        return 0

    def mix(self, streams: Tensor, logits: Tensor) -> Tensor:
        return streams


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


class OneSidedMixing(DenseMixing):
    """H_res = a softmax over each row of n x n logits: one half of what mHC normalises (one-sided HC, osHC).

    Each new stream is a weighted mean of the streams, so equal ones stay bitwise equal, but the columns need not sum to
    1: streams may be forgotten. The logits on the diagonal are pinned to 0, which keeps the same set of matrices with
    n (n - 1) logits, row by row.
    """

    doubly_stochastic = "no"
    rows_sum_to_one = True

    @staticmethod
    def count_logits(num_streams: int) -> int:
        return num_streams * (num_streams - 1)

    def matrix(self, logits: Tensor) -> Tensor:
        n = self.num_streams
        # The entries off the diagonal, read row by row, are n - 1 runs of n with one of the diagonal between them.
        runs = F.pad(logits.unflatten(-1, (n - 1, n)), (1, 0))
        return torch.softmax(F.pad(runs.flatten(-2), (0, 1)).unflatten(-1, (n, n)), dim=-1)


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
    "one_sided": OneSidedMixing,
    "circulant": CirculantMixing,
    "go_mhc": GoMHCMixing,
    "orthogonal": OrthogonalMixing,
}
