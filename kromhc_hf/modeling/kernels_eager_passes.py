# Code of kromhc-hf, which travels with every model that it saves.
"""The passes over the streams in plain PyTorch, and their gradients, in few and large operations.

Sums are computed in the dtype of the coefficients (at least fp32). Streams that are narrower are worked on in spans of
tokens that fit in the cache, so that there is never a wide copy of all streams. Streams are `[T, n, C]` here, tokens in
one dimension.
"""

from math import gcd
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .mixing import snap_distance


# A span of wide streams should share a level 2 cache of 1 MiB per core with its sources; a GPU needs parallel work.
SPAN_ELEMENTS, SPAN_ELEMENTS_GPU = 3 << 16, 1 << 25


def spans(streams: Tensor, dtype: torch.dtype) -> list[slice]:
    """Slices of tokens that are worked on together in `dtype`: all, or what fits in the cache if they must be cast."""
    tokens = max(1, streams.shape[0])
    if streams.dtype == dtype:
        return [slice(0, tokens)]
    limit = SPAN_ELEMENTS if streams.device.type == "cpu" else SPAN_ELEMENTS_GPU
    step = max(1, limit // streams.shape[1:].numel())
    return [slice(start, start + step) for start in range(0, tokens, step)]


def project(streams: Tensor, weight: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The thin product and the norm behind it: products `[T, G, k]` and mean squares `[T, G]`.

    `weight` is `[k, n * C / G]`: all features of a token together (G = 1) or each stream by itself (G = n). What the
    norm divides by follows later, on k numbers instead of n * C features.
    """
    if weight is None:
        return None, None
    tokens, (outputs, width) = streams.shape[0], weight.shape
    groups = streams.shape[1:].numel() // width
    # Libraries have fast code for multiples of 8. Made here, the weight always lies at the start of a cache line: on
    # two threads the last bits depend on that, and a model must compute the same after it was saved and loaded.
    padded = F.pad(weight, (0, 0, 0, -outputs % 8))
    products = streams.new_empty(tokens * groups, len(padded), dtype=weight.dtype)
    norms = streams.new_empty(tokens * groups, dtype=weight.dtype)
    for span in spans(streams, weight.dtype):
        rows = streams[span].reshape(-1, width).to(weight.dtype)
        place = slice(span.start * groups, span.start * groups + len(rows))
        torch.mm(rows, padded.t(), out=products[place])
        torch.linalg.vector_norm(rows, dim=-1, out=norms[place])
    products = products[:, :outputs].contiguous().view(tokens, groups, outputs)
    return products, norms.square_().div_(width).view(tokens, groups)


def transformed() -> bool:
    """Whether forward-mode derivatives or transforms of `torch.func` are under way, which know plain operations alone.

    Tensors do not tell: a weight of the model inside a branch may be what is differentiated.
    """
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def gap_to_one(weights: Tensor) -> Tensor:
    """By how much the sum of the weights exceeds 1, `[..., n]` -> `[..., 1]`; within `snap_distance` it counts as 0.

    Not `snapped_sum` less 1, which would round once more. Gradients do not notice.
    """
    gap = weights.sum(-1, keepdim=True).sub_(1)
    if not (gap.requires_grad or transformed()):
        return F.hardshrink(gap, snap_distance(weights.dtype))
    fixed = gap.detach()
    return gap - (fixed - F.hardshrink(fixed, snap_distance(weights.dtype)))


def first_weight(weights: Tensor) -> Tensor:
    """What the first stream weighs beside the differences, `[..., n]` -> `[..., 1]`: the sum of the weights."""
    return gap_to_one(weights) + 1


class Streams(NamedTuple):
    """Streams `[T, n, C]`, and in which form weighted sums of them are computed so that equal ones are not rounded."""

    tokens: Tensor
    form: str

    @classmethod
    def of(cls, tokens: Tensor) -> "Streams":
        """Looks whether the streams are equal where that is free, otherwise takes the form that need not know.

        On a GPU the look would wait for everything before it; a traced or a fake tensor has nothing to look at.
        """
        if tokens.device.type != "cpu" or type(tokens) is not Tensor or torch.jit.is_tracing():
            return cls(tokens, "differences")
        return cls(tokens, "equal" if all_equal(tokens) else "plain")

    def sums(self, weights: Tensor, span: slice, out: Tensor, sum_to_one: bool = False) -> Tensor:
        """`sum_j weights[t, i, j] streams[t, j]` of a span, `[T, i, n]` -> `[T, i, C]`, in `out` or wider than that."""
        weights, streams = weights[span], self.tokens[span]
        if self.form != "plain":
            first = torch.ones_like(weights[..., :1]) if sum_to_one else first_weight(weights)
            # Without differences the sum of the weights is all that counts.
            weights = first if self.form == "equal" else torch.cat([first, weights[..., 1:]], dim=-1)
        if self.form == "equal":
            streams = streams[:, :1]
        streams = streams.to(weights.dtype)
        if self.form == "differences":
            # The differences of equal streams are exactly 0, and 0 whatever they are weighted with.
            streams = torch.cat([streams[:, :1], streams[:, 1:] - streams[:, :1]], dim=1)
        return product(weights, streams, out)


def all_equal(streams: Tensor) -> bool:
    """Whether every token `[T, n, C]` has n equal streams. Streams that differ mostly do so in the first token."""
    if streams.stride(1) == 0:
        return True
    return all(
        torch.equal(streams[:length, 0], streams[:length, j])
        for length in (1, streams.shape[0])
        for j in range(1, streams.shape[1])
    )


def read(streams: Streams, h_pre: Tensor) -> Tensor:
    """`sum_j h_pre[j] streams[j]`, `[T, C]` in the dtype of the streams."""
    tokens = streams.tokens
    out = tokens.new_empty(tokens.shape[0], 1, tokens.shape[2])
    for span in spans(tokens, h_pre.dtype):
        part = out[span]
        store(part, streams.sums(h_pre.unsqueeze(1), span, part))
    return out.squeeze(1)


def write(streams: Streams, h_res: Tensor, h_post: Tensor, branch_output: Tensor, rows_sum_to_one: bool) -> Tensor:
    """`sum_j h_res[i, j] streams[j] + h_post[i] branch_output`, `[T, n, C]`."""
    tokens = streams.tokens
    out = torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)
    for span in spans(tokens, h_post.dtype):
        part = out[span]
        mixed = streams.sums(h_res, span, part, rows_sum_to_one)
        output = branch_output[span].unsqueeze(1).to(h_post.dtype)
        store(part, mixed.addcmul_(h_post[span].unsqueeze(-1), output))
    return out


def product(left: Tensor, right: Tensor, place: Tensor) -> Tensor:
    """A batched product, in `place` if that has its dtype."""
    return torch.bmm(left, right, out=place) if place.dtype == left.dtype else torch.bmm(left, right)


def store(place: Tensor, value: Tensor) -> None:
    """Puts a value that may be wider, or there already, into its place."""
    if value.data_ptr() != place.data_ptr():
        place.copy_(value)


def correlation(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """`sum_c left[t, i, c] right[t, j, c]`, `[T, i, j]` in `dtype`."""
    out = left.new_empty(len(left), left.shape[1], right.shape[1], dtype=dtype)
    for span in spans(right, dtype):
        torch.bmm(left[span].to(dtype), right[span].to(dtype).mT, out=out[span])
    return out


def streams_gradient(
    streams: Tensor,
    h_pre: Tensor,
    h_res: Tensor,
    grad_input: Tensor | None,
    grad_mixed: Tensor | None,
    weight: Tensor | None,
    grad_products: Tensor | None,
    grad_squares: Tensor | None,
) -> Tensor:
    """What mixing, reading, projection and norm say about the streams, `[T, n, C]`."""
    out, dtype = torch.empty(streams.shape, dtype=streams.dtype, device=streams.device), h_pre.dtype
    for span in spans(streams, dtype):
        part = out[span]
        if grad_mixed is None:
            value = torch.zeros_like(part, dtype=dtype)
        else:
            value = product(h_res[span].mT, grad_mixed[span].to(dtype), part)
        if grad_input is not None:
            value.addcmul_(h_pre[span].unsqueeze(-1), grad_input[span].unsqueeze(1).to(dtype))
        if weight is not None and grad_products is not None and grad_squares is not None:
            rows = value.view(-1, weight.shape[1])
            rows.addmm_(grad_products[span].flatten(0, 1), weight)
            # The mean square is over one row.
            scale = grad_squares[span].view(-1, 1) * (2 / weight.shape[1])
            rows.addcmul_(scale, streams[span].reshape(rows.shape).to(dtype))
        store(part, value)
    return out


def weight_gradient(streams: Tensor, weight: Tensor, grad_products: Tensor) -> Tensor:
    """`sum_t grad_products[t] streams[t]`, like the weight."""
    out = torch.zeros_like(weight)
    for span in spans(streams, weight.dtype):
        rows = streams[span].reshape(-1, weight.shape[1]).to(weight.dtype)
        grads = grad_products[span].flatten(0, 1)
        # Libraries do not divide a sum over tokens between threads well.
        parts = gcd(len(rows), 2 * torch.get_num_threads())
        out += torch.bmm(grads.unflatten(0, (parts, -1)).mT, rows.unflatten(0, (parts, -1))).sum(0)
    return out
