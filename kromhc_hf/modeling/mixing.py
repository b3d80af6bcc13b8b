# Code of kromhc-hf, which travels with every model that it saves.
"""What a variant must say, how its logits become mappings, and the invariant that most of them keep."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .known_values import keeps, kept_indices
from .option_table import SINKHORN_ITERATIONS


PAPER_RESIDUAL_LOGIT = 8.0
# Static mappings have neither weight nor alpha.
IfDynamic = Tensor | None


class Mixing:
    """A variant: how many logits it takes, where they start, how they are predicted and how they mix the streams.

    Most variants say `doubly_stochastic`, `count_logits` and `mix` alone. A mixing holds no parameters, the
    hyper-connection does.

    Args:
        num_streams: n, the number of streams.
        sinkhorn_iterations: used by the variants that iterate, and accepted by all, so that one loop can compare them.

    Raises:
        ValueError: if the variant is not defined for this number of streams.
    """

    # Whether `h_res` is doubly stochastic for any logits: up to rounding, as far as an iteration has converged, or not.
    doubly_stochastic: Literal["exactly", "by iteration", "no"]
    # Whether `predict` and `gates` are the ones below, which the fused kernels carry out.
    plain_gates = True

    def __init__(self, num_streams: int, sinkhorn_iterations: int = SINKHORN_ITERATIONS):
        self.num_streams = check_num_streams(num_streams)
        if isinstance(sinkhorn_iterations, bool) or not isinstance(sinkhorn_iterations, int) or sinkhorn_iterations < 1:
            raise ValueError(
                f"sinkhorn_iterations must be an int of at least 1; got {sinkhorn_iterations!r}. The default is "
                f"{SINKHORN_ITERATIONS}."
            )
        self.sinkhorn_iterations = sinkhorn_iterations
        self.check_defined_for(num_streams)
        self.num_logits = self.count_logits(num_streams)
        # Of bias and predictions: for read weights, write weights and mixing.
        self.sizes = (num_streams, num_streams, self.num_logits)

    @staticmethod
    def count_logits(num_streams: int) -> int:
        """How many residual logits n streams take."""
        raise NotImplementedError

    @staticmethod
    def check_defined_for(num_streams: int) -> None:
        """Refuses numbers of streams, whole and at least 1, that the variant is not defined for; by default none.

        Raises:
            ValueError: with the rule, the value and the way out.
        """

    @property
    def rows_sum_to_one(self) -> bool:
        """Whether the rows of `h_res` sum to 1 for any logits, up to rounding; the columns need not."""
        return self.doubly_stochastic == "exactly"

    def initial_logits(self, residual_logit: float) -> Tensor:
        """Logits `[num_logits]` that lean towards the identity; the larger `residual_logit`, the closer to it.

        By default all are `-residual_logit`, for variants whose identity has no logit of its own.
        """
        return torch.full((self.num_logits,), -residual_logit, dtype=torch.float32)

    def mix(self, streams: Tensor, logits: Tensor) -> Tensor:
        """`mixed[i] = sum_j h_res[i, j] streams[j]`: `[..., n, C]` and `[..., num_logits]` -> `[..., n, C]`."""
        raise NotImplementedError

    def matrix(self, logits: Tensor) -> Tensor:
        """`h_res` itself, `[..., num_logits]` -> `[..., n, n]`: what mixing does to the unit vectors."""
        identity = torch.eye(self.num_streams, dtype=logits.dtype, device=logits.device)
        return self.mix(identity.expand(*logits.shape[:-1], -1, -1), logits)

    def initial_bias(self, init: str, branch_index: int, residual_logit: float) -> Tensor:
        """The static part of all mappings at initialisation, `[n + n + num_logits]` for read, write and mixing.

        With init "identity" the read weights sum to 1 and the write weights are 1, so equal streams stay equal; the
        read weights differ between streams, since equal ones would receive equal gradients for ever.
        """
        favoured = torch.arange(self.num_streams) == branch_index % self.num_streams
        if init == "paper":
            pre = post = 2 * favoured.float() - 1
            residual_logit = PAPER_RESIDUAL_LOGIT
        else:
            pre = torch.logit(uneven_weights(favoured)).float()
            post = torch.zeros_like(pre)
        return torch.cat([pre, post, self.initial_logits(residual_logit)])

    def weight_shape(self, hidden_size: int) -> tuple[int, int]:
        """Shape of the weight that predicts the mappings: outputs x input features."""
        return sum(self.sizes), self.num_streams * hidden_size

    def predict(self, products: Tensor, scale: Tensor) -> Tensor:
        """The token dependent part of all mappings before the gates, `[..., n + n + num_logits]`.

        Args:
            products: the features times the weight, `[..., outputs]`, or `[..., n, outputs]` where the weight is of
                width C, so that each stream is projected by itself.
            scale: one over the root mean square of the features, `[..., 1]` or `[..., n, 1]`. It is one number for all
                of them, so it follows the thin product instead of touching all features.
        """
        return products * scale

    def gates(self, pre: Tensor, post: Tensor) -> tuple[Tensor, Tensor]:
        """`h_pre` and `h_post` from their logits, `[..., n]` each."""
        half = torch.sigmoid(post)
        return torch.sigmoid(pre), half + half  # exactly twice, without making a tensor of the 2

    def gated(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`h_pre [..., n]`, `h_post [..., n]` and the residual logits, from all logits `[..., n + n + num_logits]`."""
        pre, post, residual = logits.split_with_sizes(self.sizes, -1)
        return *self.gates(pre, post), residual

    def by_output(self, alpha: Tensor) -> Tensor:
        """What each prediction is multiplied with, `[n + n + num_logits]`, from a number per mapping, `[3]`."""
        if keeps(alpha):
            return alpha.index_select(0, kept_indices(self.sizes))
        parts = alpha.unsqueeze(-1).unbind()
        return torch.cat([part.expand(size) for part, size in zip(parts, self.sizes)])

    def weights_and_logits(
        self, products: Tensor | None, squares: Tensor | None, bias: Tensor, alpha: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`h_pre [..., n]`, `h_post [..., n]` and the residual logits; without leading dimensions if static.

        Args:
            products: as in `predict`; None if the mappings are static.
            squares: the mean squares of the features, to which eps is added, `[..., 1]` or `[..., n, 1]`; None with
                the products.
            bias: the static part `[n + n + num_logits]`.
            alpha: what the predictions for read weights, write weights and mixing are multiplied with, `[3]`.
        """
        if products is None or squares is None or alpha is None:
            return self.gated(bias)
        dynamic = self.predict(products, torch.rsqrt(squares))
        return self.gated(torch.addcmul(bias, self.by_output(alpha), dynamic))

    def mappings(
        self,
        products: Tensor | None,
        squares: Tensor | None,
        bias: Tensor,
        alpha: Tensor | None,
        leading: tuple[int, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`h_pre [..., n]`, `h_post [..., n]` and `h_res [..., n, n]`, with these leading dimensions also if static."""
        h_pre, h_post, logits = self.weights_and_logits(products, squares, bias, alpha)
        h_res = self.matrix(logits)
        return for_tokens(h_pre, leading), for_tokens(h_post, leading), for_tokens(h_res, leading, 2)


class DenseMixing(Mixing):
    """A variant that builds `h_res` entry by entry, by default from as many logits; subclasses write `matrix`."""

    @staticmethod
    def count_logits(num_streams: int) -> int:
        return num_streams**2

    def matrix(self, logits: Tensor) -> Tensor:
        raise NotImplementedError

    def mix(self, streams: Tensor, logits: Tensor) -> Tensor:
        h_res = self.matrix(logits)
        # Relative to the first stream, so that equal streams are not even rounded. Not a matrix product: those of
        # this size are slow, and on GPUs they may be cut to TF32.
        first = streams[..., :1, :]
        others = h_res[..., 1:].unsqueeze(-1) * (streams[..., 1:, :] - first).unsqueeze(-3)
        return (first if self.rows_sum_to_one else snapped_sum(h_res) * first) + others.sum(-2)


def check_num_streams(num_streams: object) -> int:
    """Returns `num_streams` if it is a whole number of at least 1.

    Raises:
        ValueError: with the rule, the value and the way out.
    """
    if isinstance(num_streams, bool) or not isinstance(num_streams, int):
        raise ValueError(
            f"num_streams must be an int; got {num_streams!r} of type {type(num_streams).__name__}. "
            "Use for example num_streams=4."
        )
    if num_streams < 1:
        raise ValueError(f"num_streams must be at least 1; got {num_streams}. Use for example num_streams=4.")
    return num_streams


def uneven_weights(favoured: Tensor) -> Tensor:
    """Weights that sum to 1 with one stream ahead, in float64: (n + 1) / 2n where `favoured` `[n]`, else 1 / 2n."""
    n = favoured.numel()
    # The dtype is explicit because models are built under their own default dtype.
    return torch.full((n,), 1 / (2 * n), dtype=torch.float64).masked_fill(favoured, (n + 1) / (2 * n))


def for_tokens(mapping: Tensor, leading: tuple[int, ...], dims: int = 1) -> Tensor:
    """A mapping with these leading dimensions, if it has none since it is static; its own last ones are `dims`."""
    return mapping.expand(*leading, *mapping.shape) if mapping.dim() == dims else mapping


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in this dtype; not even an operation if it is."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def filled_up(weight: Tensor) -> Tensor:
    """The weight `[k, width]` in memory of its own, and rows of zeros up to a number that libraries are fast with.

    That is a multiple of 8 and at least 16, with which a product takes less time than with 8.
    """
    outputs = weight.shape[0]
    return F.pad(weight, (0, 0, 0, max(16 - outputs, -outputs % 8)))


def widest_dtype(tensor: Tensor) -> torch.dtype:
    """float64, where the device has it: for sums over many entries of a small matrix."""
    return tensor.dtype if tensor.device.type == "mps" else torch.float64


def snap_distance(dtype: torch.dtype) -> float:
    """By how much a sum of weights may miss 1 and be taken to be exactly 1: 4 eps.

    Equal streams then pass through bitwise unchanged wherever the weights sum to 1 in exact arithmetic: sigmoids and
    exponentials differ in their last bit between devices.
    """
    return 4 * torch.finfo(dtype).eps


def snapped_sum(weights: Tensor) -> Tensor:
    """The sum over the last dimension, which is kept, and exactly 1 within `snap_distance`. Gradients do not notice."""
    total = weights.sum(-1, keepdim=True)
    gap = (1 - total).detach()
    return total + gap.masked_fill(gap.abs() > snap_distance(gap.dtype), 0)


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
