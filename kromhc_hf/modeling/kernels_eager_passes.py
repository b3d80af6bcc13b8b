# Code of kromhc-hf, which travels with every model that it saves.
"""The passes over the streams in plain PyTorch, and their gradients, in few and large operations.

Sums are computed in the dtype of the coefficients (at least fp32), and there is never a wide copy of all streams. On a
CPU narrower streams are worked on in spans of tokens that fit in the cache. An accelerator takes streams in bf16 as
they are: its products sum in fp32, and coefficients go in as two numbers in bf16, which sum to them. Streams are
`[T, n, C]` here, tokens in one dimension.
"""

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .known_values import all_equal, may_look, number, number_tensor, transformed
from .mixing import cast, filled_up, snap_distance


# A span of wide streams should share a level 2 cache of 1 MiB per core with its sources; a GPU needs parallel work.
SPAN_ELEMENTS, SPAN_ELEMENTS_GPU = 3 << 16, 1 << 25
# Libraries have refused batches of more products than a launch has blocks in a dimension, 65,535.
SPAN_PRODUCTS_GPU = 1 << 15
# Whose products of numbers in bf16 can leave sums in fp32; meta tensors stand for them.
WIDE_SUMS = ("cuda", "meta") if torch.version.hip is None and "dtype" in torch.ops.aten.bmm.overloads() else ()


def narrow(streams: Tensor) -> bool:
    """Whether products take the streams as they are: in bf16, which has the exponents of fp32, on an accelerator."""
    return streams.dtype == torch.bfloat16 and streams.device.type != "cpu"


def held(streams: Tensor, dtype: torch.dtype) -> torch.dtype:
    """In what dtype streams are held where they meet coefficients in `dtype`."""
    return streams.dtype if narrow(streams) else dtype


def spans(streams: Tensor, dtype: torch.dtype) -> list[slice]:
    """Slices of tokens that are worked on together in `dtype`: all, or what fits in the cache if they must be cast."""
    tokens, on_cpu = max(1, streams.shape[0]), streams.device.type == "cpu"
    if streams.dtype != dtype:
        step = max(1, (SPAN_ELEMENTS if on_cpu else SPAN_ELEMENTS_GPU) // streams.shape[1:].numel())
    else:
        step = tokens if on_cpu else SPAN_PRODUCTS_GPU
    return [slice(start, start + step) for start in range(0, tokens, step)]


def in_spans(dtype: torch.dtype, tokens: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
    """The tensors span by span, see `spans`; as they are where one span has all tokens."""
    found = spans(tokens, dtype)
    if len(found) == 1:
        return [(tokens, *others)]
    return [tuple(tensor[span] for tensor in (tokens, *others)) for span in found]


def halves(coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    """Two narrow numbers for each coefficient, which sum to it up to the square of their rounding, `[..., 2, last]`."""
    *leading, last = coefficients.shape
    out = coefficients.new_empty(*leading, 2, last, dtype=dtype)
    high, low = out.unbind(-2)
    torch.sub(coefficients, high.copy_(coefficients), out=low)
    return out


def project(streams: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor | None, Tensor | None]:
    """The thin product and the norm behind it: products `[T, k]`, and mean squares with eps added `[T, 1]`.

    `weight` is `[k, n * C]`; with `[k, C]` each stream is projected by itself, and there are `[T, n, k]` products and
    `[T, n, 1]` mean squares. What the norm divides by follows later, on k numbers instead of n * C features. Of streams
    that are one, expanded, this one is projected, with the sum of their weights.
    """
    if weight is None:
        return None, None
    (tokens, n, features), outputs = streams.shape, weight.shape[0]
    by_stream, one_for_all = weight.shape[1] == features, streams.stride(1) == 0
    if one_for_all:
        streams, weight = streams[:, :1], weight.reshape(outputs, -1, features).sum(1)
    width = weight.shape[1]
    # Made here, the weight always lies at the start of a cache line: on two threads the last bits depend on that, and a
    # model must compute the same after it was saved and loaded.
    padded = weight if one_for_all else filled_up(weight)
    dtype = held(streams, weight.dtype)
    whole = dtype == weight.dtype
    factor = padded if whole else halves(padded, dtype).flatten(0, 1)
    products, norms = [], []
    for (part,) in in_spans(dtype, streams):
        rows = cast(part.reshape(-1, width), dtype)
        norms.append(torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=weight.dtype))
        if whole:
            products.append(torch.mm(rows, factor.t())[:, :outputs].contiguous())
        else:
            by_half = wide_sums(rows.unsqueeze(0), factor.t().unsqueeze(0)).squeeze(0).unflatten(-1, (-1, 2))
            products.append(by_half[:, :outputs].sum(-1))
    found, norm = joined(products), joined(norms)
    squares = torch.addcmul(number_tensor(eps, norm), norm, norm, value=1 / width)
    if by_stream and one_for_all:
        return found.unsqueeze(1).expand(-1, n, -1), squares.unsqueeze(1).expand(-1, n, -1)
    if by_stream:
        return found.view(tokens, n, outputs), squares.view(tokens, n, 1)
    return found, squares


def joined(parts: list[Tensor]) -> Tensor:
    """One tensor of those of spans."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def gap_to_one(weights: Tensor) -> Tensor:
    """By how much the sum of the weights exceeds 1, `[..., n]` -> `[..., 1]`; within `snap_distance` it counts as 0.

    Not `snapped_sum` less 1, which would round once more. Gradients do not notice.
    """
    gap = weights.sum(-1, keepdim=True).sub_(number(1, weights))
    if not (gap.requires_grad or transformed()):
        return F.hardshrink(gap, snap_distance(weights.dtype))
    fixed = gap.detach()
    return gap - (fixed - F.hardshrink(fixed, snap_distance(weights.dtype)))


def first_weight(weights: Tensor) -> Tensor:
    """What the first stream weighs beside the differences, `[..., n]` -> `[..., 1]`: the sum of the weights."""
    return gap_to_one(weights) + number(1, weights)


class Streams(NamedTuple):
    """Streams `[T, n, C]`, and in which form weighted sums of them are computed so that equal ones are not rounded.

    Streams that are found equal are one, expanded.
    """

    tokens: Tensor
    form: str

    @classmethod
    def of(cls, tokens: Tensor) -> "Streams":
        """Looks whether the streams are equal where that is free, otherwise takes a form that need not know.

        On a GPU the look would wait for everything before it; a traced or a fake tensor has nothing to look at. Narrow
        streams have fewer bits than sums of their products: weights that sum to 1 give back what equal streams were,
        once it is rounded.
        """
        if narrow(tokens):
            return cls(tokens, "plain")
        if not may_look(tokens):
            return cls(tokens, "differences")
        return cls(tokens[:, :1].expand_as(tokens), "equal") if all_equal(tokens) else cls(tokens, "plain")

    def stay(self, rows_sum_to_one: bool) -> bool:
        """Whether mixing leaves the streams as they are: equal ones, by rows that sum to 1."""
        return rows_sum_to_one and self.form == "equal"

    def sums(self, weights: Tensor, streams: Tensor, out: Tensor, sum_to_one: bool = False) -> Tensor:
        """`sum_j weights[t, i, j] streams[t, j]` of a span, `[T, i, n]` -> `[T, i, C]`, in `out` or wider than that."""
        if self.form == "plain":
            return product(weights, cast(streams, held(streams, weights.dtype)), out)
        first = cast(streams[:, :1], weights.dtype)
        if self.form == "equal":
            # Without differences the sum of the weights is all that counts.
            place = out if out.dtype == weights.dtype else None
            return torch.addcmul(first, gap_to_one(weights), first, out=place)
        # The differences of equal streams are exactly 0, and 0 whatever they are weighted with. What they are added to
        # is no factor of the product, which may be cut to TF32.
        total = first.expand(-1, weights.shape[1], -1) if sum_to_one else first_weight(weights) * first
        differences = cast(streams[:, 1:], weights.dtype) - first
        place = out if out.dtype == weights.dtype else None
        return torch.baddbmm(total, weights[..., 1:], differences, out=place)


# What these return is no view: hooks may change the output of an autograd function in place if it is none.
def read(streams: Streams, h_pre: Tensor, leading: Sequence[int]) -> Tensor:
    """`sum_j h_pre[j] streams[j]`, `[*leading, C]` in the dtype of the streams, which are `[T, n, C]`."""
    tokens = streams.tokens
    out = tokens.new_empty(*leading, tokens.shape[2])
    places = out.view(tokens.shape[0], 1, tokens.shape[2])
    for part, weights, place in in_spans(held(tokens, h_pre.dtype), tokens, h_pre.unsqueeze(1), places):
        store(place, streams.sums(weights, part, place))
    return out


def write(
    streams: Streams,
    h_res: Tensor | None,
    h_post: Tensor,
    branch_output: Tensor,
    rows_sum_to_one: bool,
    leading: Sequence[int],
) -> Tensor:
    """`sum_j h_res[i, j] streams[j] + h_post[i] branch_output`, `[*leading, n, C]`; no h_res where the streams stay."""
    tokens, stay = streams.tokens, streams.stay(rows_sum_to_one)
    out = torch.empty((*leading, *tokens.shape[1:]), dtype=tokens.dtype, device=tokens.device)
    dtype, weights = held(tokens, h_post.dtype), h_post if h_res is None else h_res
    gates, outputs, places = h_post.unsqueeze(-1), branch_output.unsqueeze(1), out.view(tokens.shape)
    for part, weight, gate, output, place in in_spans(dtype, tokens, weights, gates, outputs, places):
        mixed = cast(part[:, :1], dtype) if stay else streams.sums(weight, part, place, rows_sum_to_one)
        there = place if place.dtype == mixed.dtype else None
        store(place, torch.addcmul(mixed, gate, cast(output, dtype), out=there))
    return out


def wide_sums(left: Tensor, right: Tensor) -> Tensor:
    """A batched product of narrow factors with its sums in fp32."""
    if left.device.type in WIDE_SUMS:
        return torch.bmm(left, right, out_dtype=torch.float32)
    high = torch.bmm(left, right)
    # And what was lost when it was rounded.
    return torch.baddbmm(high, left, right, beta=-1).float().add_(high)


def product(left: Tensor, right: Tensor, place: Tensor) -> Tensor:
    """A batched product of coefficients and streams, in `place` if that has the dtype of the streams."""
    if left.dtype != right.dtype:
        high, low = halves(left, right.dtype).unbind(-2)
        # What is small comes first, so that rounding it in between does not show.
        return torch.bmm(low, right, out=place).baddbmm_(high, right)
    return torch.bmm(left, right, out=place if place.dtype == left.dtype else None)


def store(place: Tensor, value: Tensor) -> None:
    """Puts a value that may be wider, or there already, into its place."""
    if value is not place:
        place.copy_(value)


def different(grad: Tensor) -> Tensor:
    """The gradients of the streams that differ, `[..., n, C]` -> `[T, n, C]`, or `[T, 1, C]` if there is one for all.

    Behind a sum over streams it is expanded, and written out it would send batched products through a loop over tokens.
    """
    one_for_all = grad.stride(-2) == 0 and grad.shape[-2] > 1
    return (grad[..., :1, :] if one_for_all else grad).contiguous().flatten(0, -3)


def correlation(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """`sum_c left[t, i, c] right[t, j, c]`, `[T, i, j]` in `dtype`."""
    if right.stride(1) == 0 and right.shape[1] > 1:
        # Batched products know no expanded factors: they would be copied, or go through a loop over tokens.
        return correlation(left, right[:, :1], dtype).expand(-1, -1, right.shape[1])
    left, factors = left.contiguous(), held(right, dtype)
    if factors != dtype:
        return joined([wide_sums(others, part.mT) for part, others in in_spans(factors, right, left)])
    parts = in_spans(dtype, right, left)
    return joined([torch.bmm(cast(others, dtype), cast(part, dtype).mT) for part, others in parts])


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
    out = torch.empty(streams.shape, dtype=streams.dtype, device=streams.device)
    dtype = held(streams, h_pre.dtype)
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
            rows.addmm_(grad_products[span].reshape(-1, weight.shape[0]).to(dtype), weight.to(dtype))
            # The mean square is over one row.
            scale = grad_squares[span].view(-1, 1) * (2 / weight.shape[1])
            rows.addcmul_(scale, streams[span].reshape(rows.shape).to(dtype))
        store(part, value)
    return out


def weight_gradient(streams: Tensor, weight: Tensor, grad_products: Tensor) -> Tensor:
    """`sum_t grad_products[t] streams[t]`, like the weight."""
    dtype, parts = held(streams, weight.dtype), []
    for part, grads in in_spans(dtype, streams, grad_products):
        rows, grads = cast(part.reshape(-1, weight.shape[1]), dtype), grads.reshape(-1, weight.shape[0])
        if dtype == weight.dtype:
            # Libraries do not divide a sum over tokens between threads well.
            count = gcd(len(rows), 2 * torch.get_num_threads())
            parts.append(torch.bmm(grads.unflatten(0, (count, -1)).mT, rows.unflatten(0, (count, -1))).sum(0))
        else:
            by_half = wide_sums(halves(grads, dtype).flatten(1).t().unsqueeze(0), rows.unsqueeze(0))
            parts.append(by_half.view(2, *weight.shape).sum(0))
    return sum(parts[1:], parts[0])
