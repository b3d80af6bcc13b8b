"""Reads and writes the streams in plain PyTorch, at the cost of about ten copies of them for a training step.

Every pass runs over spans of tokens that fit in the cache, in the dtype of the coefficients (at least fp32), so that
there is never a wide copy of all streams. Streams are `[T, n, C]` here, tokens in one dimension.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


# From products [T, G, k] and mean squares [T, G] of G groups of features, bias and alpha to
# h_pre [T, n], h_post [T, n] and h_res [T, n, n]; without dynamic mappings the first two are None.
Coefficients = Callable[[Tensor | None, Tensor | None, Tensor, Tensor | None, int], tuple[Tensor, Tensor, Tensor]]

# A span of wide streams should share a level 2 cache of 1 MiB per core with its sources; a GPU needs parallel work.
SPAN_ELEMENTS, SPAN_ELEMENTS_GPU = 3 << 16, 1 << 25


EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}

# The same with and without gradients, so that both give the same bits.
FEW_TOKENS = 16


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Leaves autocast; where there is none to leave, at no cost."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def span_length(streams: Tensor) -> int:
    """How many tokens are worked on together."""
    limit = SPAN_ELEMENTS if streams.device.type == "cpu" else SPAN_ELEMENTS_GPU
    return max(1, limit // streams.shape[1:].numel())


def spans(streams: Tensor, whole: bool = False) -> list[slice]:
    """Slices of tokens that are worked on together, all of them if `whole`."""
    step = max(1, streams.shape[0]) if whole else span_length(streams)
    return [slice(start, start + step) for start in range(0, streams.shape[0], step)]


def project(streams: Tensor, weight: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The thin product and the norm behind it: products `[T, G, k]` and mean squares `[T, G]`.

    `weight` is `[k, n * C / G]`: all features of a token together (G = 1) or each stream by itself (G = n). What the
    norm divides by follows later, on k numbers instead of n * C features.
    """
    if weight is None:
        return None, None
    tokens, (outputs, width) = streams.shape[0], weight.shape
    groups = streams.shape[1:].numel() // width
    products = streams.new_empty(tokens * groups, outputs, dtype=weight.dtype)
    norms = streams.new_empty(tokens * groups, dtype=weight.dtype)
    whole = streams.dtype == weight.dtype and streams.is_contiguous()
    for span in spans(streams, whole):
        rows = streams[span].reshape(-1, width).to(weight.dtype)
        place = slice(span.start * groups, span.start * groups + len(rows))
        # Not the thin side first, although that is faster: on two threads its last bits would depend on where in memory
        # the weight lies, and a model would not compute the same after it was saved and loaded.
        torch.mm(rows, weight.t(), out=products[place])
        torch.linalg.vector_norm(rows, dim=-1, out=norms[place])
    return products.view(tokens, groups, outputs), norms.square_().div_(width).view(tokens, groups)


def differences(streams: Tensor, out: Tensor) -> Tensor:
    """The first stream and what the others differ from it by, into `out` `[T, at least n, C]`.

    Where the streams are equal the differences are exactly 0, and any weights that sum to 1 keep the stream bitwise.
    """
    n = streams.shape[1]
    first = out[:, :1]
    first.copy_(streams[:, :1])
    # The wide operand makes the subtraction wide.
    torch.sub(streams[:, 1:], first, out=out[:, 1:n])
    return out


def gap_to_one(weights: Tensor) -> Tensor:
    """By how much the sum of the weights exceeds 1, `[..., n]` -> `[..., 1]`; up to 4 eps count as none.

    See `snapped_sum`: equal streams then pass bitwise wherever the weights sum to 1 in exact arithmetic. Gradients do
    not notice.
    """
    gap = weights.sum(-1, keepdim=True).sub_(1)
    if not gap.requires_grad:
        return F.hardshrink(gap, 4 * EPS[weights.dtype])
    fixed = gap.detach()
    return gap - (fixed - F.hardshrink(fixed, 4 * EPS[weights.dtype]))


def first_weight(weights: Tensor) -> Tensor:
    """What the first stream weighs beside the differences, `[..., n]` -> `[..., 1]`: the sum of the weights."""
    return gap_to_one(weights) + 1


def read(streams: Tensor, h_pre: Tensor, scratch: Tensor) -> Tensor:
    """`sum_j h_pre[j] streams[j]`, `[T, C]` in the dtype of the streams; `scratch` is used up span by span."""
    row = torch.cat([first_weight(h_pre), h_pre[:, 1:]], dim=-1).unsqueeze(1)
    out = streams.new_empty(streams.shape[0], 1, streams.shape[2])
    for span in spans(streams):
        part = out[span]
        multiply(row[span], differences(streams[span], scratch[: len(part)])[:, :-1], part)
    return out.squeeze(1)


def write(
    streams: Tensor,
    h_res: Tensor,
    h_post: Tensor,
    branch_output: Tensor,
    rows_sum_to_one: bool,
    scratch: Tensor,
) -> Tensor:
    """`sum_j h_res[i, j] streams[j] + h_post[i] branch_output` in one batched product, `[T, n, C]`."""
    first = torch.ones_like(h_res[..., :1]) if rows_sum_to_one else first_weight(h_res)
    matrix = torch.cat([first, h_res[..., 1:], h_post.unsqueeze(-1)], dim=-1)
    out = streams.new_empty(streams.shape)
    for span in spans(streams):
        part = out[span]
        wide = differences(streams[span], scratch[: len(part)])
        wide[:, -1].copy_(branch_output[span])
        multiply(matrix[span], wide, part)
    return out


def multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """A batched product into `out`, whose dtype may be narrower."""
    if out.dtype == left.dtype:
        torch.bmm(left, right, out=out)
    else:
        out.copy_(torch.bmm(left, right))


def new_scratch(streams: Tensor, dtype: torch.dtype) -> Tensor:
    """Space for the wide streams of one span and a branch output beside them."""
    n, hidden_size = streams.shape[1:]
    return streams.new_empty(min(streams.shape[0], span_length(streams)), n + 1, hidden_size, dtype=dtype)


class WidthConnection(torch.autograd.Function):
    """Projects and reads the streams; its backward pass is the one of the mixing as well.

    The output `mixed` stands for `h_res @ streams`: its value is left to the depth connection, its gradient arrives
    here, where one pass over the streams serves mixing, reading, projection and norm. Saved are the streams, which
    autograd holds anyway, and about 3n numbers per token; the mappings are computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        streams: Tensor,  # [..., n, C]
        weight: Tensor | None,
        bias: Tensor,
        alpha: Tensor | None,
        coefficients: Coefficients,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tokens = streams.flatten(0, -3)
        products, squares = project(tokens, weight)
        h_pre, h_post, h_res = coefficients(products, squares, bias, alpha, tokens.shape[0])
        ctx.save_for_backward(streams, weight, bias, alpha, products, squares)
        ctx.coefficients = coefficients
        ctx.mark_non_differentiable(h_res)
        ctx.set_materialize_grads(False)
        branch_input = read(tokens, h_pre, new_scratch(tokens, h_pre.dtype))
        return branch_input.view(*streams.shape[:-2], -1), h_post, streams.detach(), h_res

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_input: Tensor | None, grad_h_post: Tensor | None, grad_mixed: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        streams, weight, bias, alpha, products, squares = ctx.saved_tensors
        with without_autocast(streams):
            tokens = streams.flatten(0, -3)
            grad_input = None if grad_input is None else grad_input.flatten(0, -2)
            grad_mixed = None if grad_mixed is None else grad_mixed.flatten(0, -3)
            leaves = [None if t is None else t.detach().requires_grad_() for t in (products, squares, bias, alpha)]
            with torch.enable_grad():
                mappings = ctx.coefficients(*leaves, tokens.shape[0])
            h_pre, _, h_res = (mapping.detach() for mapping in mappings)
            grads = (
                None if grad_input is None else correlation(grad_input.unsqueeze(1), tokens, h_pre.dtype).squeeze(1),
                grad_h_post,
                None if grad_mixed is None else correlation(grad_mixed, tokens, h_pre.dtype),
            )
            grad_products, grad_squares, grad_bias, grad_alpha = chain(mappings, grads, leaves)
            grad_streams, grad_weight = None, None
            if ctx.needs_input_grad[0]:
                grad_streams = streams_gradient(
                    tokens, h_pre, h_res, grad_input, grad_mixed, weight, grad_products, grad_squares
                ).view(streams.shape)
            if weight is not None and grad_products is not None and ctx.needs_input_grad[1]:
                grad_weight = weight_gradient(tokens, weight, grad_products)
        return grad_streams, grad_weight, grad_bias, grad_alpha, None


class DepthConnection(torch.autograd.Function):
    """Mixes the streams and adds the branch output; `mixed` comes from the width connection, see there.

    Saved are the branch output and n numbers per token.
    """

    @staticmethod
    def forward(
        ctx: Any, mixed: Tensor, h_post: Tensor, branch_output: Tensor, h_res: Tensor, rows_sum_to_one: bool
    ) -> Tensor:
        ctx.save_for_backward(h_post, branch_output)
        tokens = mixed.flatten(0, -3)
        scratch = new_scratch(tokens, h_post.dtype)
        return write(tokens, h_res, h_post, branch_output.flatten(0, -2), rows_sum_to_one, scratch).view(mixed.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h_post, branch_output = ctx.saved_tensors
        grad_h_post, grad_output = None, None
        with without_autocast(grad):
            tokens = grad.flatten(0, -3)
            if ctx.needs_input_grad[1]:
                outputs = branch_output.reshape(tokens.shape[0], 1, -1)
                grad_h_post = correlation(outputs, tokens, h_post.dtype).squeeze(1)
            if ctx.needs_input_grad[2]:
                grad_output = branch_output.new_empty(branch_output.shape)
                rows, weights = grad_output.view(tokens.shape[0], 1, -1), h_post.unsqueeze(1)
                for span in spans(tokens):
                    multiply(weights[span], tokens[span].to(h_post.dtype), rows[span])
        return grad, grad_h_post, grad_output, None, None


def correlation(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """`sum_c left[t, i, c] right[t, j, c]`, `[T, i, j]` in `dtype`."""
    out = left.new_empty(len(left), left.shape[1], right.shape[1], dtype=dtype)
    for span in spans(right):
        torch.bmm(left[span].to(dtype), right[span].to(dtype).mT, out=out[span])
    return out


def chain(
    outputs: Sequence[Tensor], grads: Sequence[Tensor | None], leaves: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of the leaves, through the small graph from them to the mappings."""
    used = [(output, grad) for output, grad in zip(outputs, grads) if grad is not None and output.requires_grad]
    present = [leaf for leaf in leaves if leaf is not None]
    found = torch.autograd.grad(
        [output for output, _ in used], present, [grad for _, grad in used], allow_unused=True, materialize_grads=True
    )
    rest = iter(found)
    return [None if leaf is None else next(rest) for leaf in leaves]


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
    for span in spans(streams):
        part = out[span] if out.dtype == dtype else out[span].to(dtype)
        if grad_mixed is None:
            part.zero_()
        else:
            torch.bmm(h_res[span].mT, grad_mixed[span].to(dtype), out=part)
        if grad_input is not None:
            part.addcmul_(h_pre[span].unsqueeze(-1), grad_input[span].unsqueeze(1).to(dtype))
        if weight is not None and grad_products is not None and grad_squares is not None:
            rows = part.view(-1, weight.shape[1])
            rows.addmm_(grad_products[span].flatten(0, 1), weight)
            # The mean square is over one row.
            scale = grad_squares[span].view(-1, 1) * (2 / weight.shape[1])
            rows.addcmul_(scale, streams[span].reshape(rows.shape).to(dtype))
        if part.dtype != out.dtype:
            out[span] = part
    return out


def weight_gradient(streams: Tensor, weight: Tensor, grad_products: Tensor) -> Tensor:
    """`sum_t grad_products[t] streams[t]`, like the weight."""
    out = torch.zeros_like(weight)
    for span in spans(streams, whole=streams.dtype == weight.dtype and streams.is_contiguous()):
        rows = streams[span].reshape(-1, weight.shape[1]).to(weight.dtype)
        out.addmm_(grad_products[span].flatten(0, 1).t(), rows)
    return out


def connect(
    streams: Tensor,
    weight: Tensor | None,
    bias: Tensor,
    alpha: Tensor | None,
    coefficients: Coefficients,
    rows_sum_to_one: bool,
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The branch input `[..., C]` of streams `[..., n, C]`, and the depth connection, which takes the branch output."""
    tokens = streams.flatten(0, -3)
    if tokens.shape[0] <= FEW_TOKENS:
        return connect_few(streams, tokens, weight, bias, alpha, coefficients, rows_sum_to_one)
    if torch.is_grad_enabled():
        branch_input, h_post, mixed, h_res = WidthConnection.apply(streams, weight, bias, alpha, coefficients)
        return branch_input, lambda output: DepthConnection.apply(mixed, h_post, output, h_res, rows_sum_to_one)

    h_pre, h_post, h_res = coefficients(*project(tokens, weight), bias, alpha, tokens.shape[0])
    branch_input = read(tokens, h_pre, new_scratch(tokens, h_pre.dtype))

    def write_back(branch_output: Tensor) -> Tensor:
        scratch, output = new_scratch(tokens, h_post.dtype), branch_output.flatten(0, -2)
        return write(tokens, h_res, h_post, output, rows_sum_to_one, scratch).view(streams.shape)

    return branch_input.view(*streams.shape[:-2], -1), write_back


def connect_few(
    streams: Tensor,
    tokens: Tensor,
    weight: Tensor | None,
    bias: Tensor,
    alpha: Tensor | None,
    coefficients: Coefficients,
    rows_sum_to_one: bool,
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The same for decoding, where the number of operations counts and not the size of what they move."""
    dtype = bias.dtype
    wide = tokens.to(dtype)
    products, squares = None, None
    if weight is not None:
        rows = wide.reshape(tokens.shape[0], -1, weight.shape[1])
        products, squares = torch.matmul(rows, weight.t()), (rows * rows).mean(-1)
    h_pre, h_post, h_res = coefficients(products, squares, bias, alpha, tokens.shape[0])
    first = wide[:, :1]
    rest = wide[:, 1:] - first
    read_rest = h_pre[:, 1:].unsqueeze(1)
    branch_input = torch.baddbmm(first, read_rest, rest).addcmul_(gap_to_one(h_pre).unsqueeze(1), first)

    def write_back(branch_output: Tensor) -> Tensor:
        base = first if rows_sum_to_one else first_weight(h_res) * first
        output = branch_output.reshape(tokens.shape[0], 1, -1)
        mixed = torch.baddbmm(base, h_res[..., 1:], rest).addcmul_(h_post.unsqueeze(-1), output)
        return mixed.to(streams.dtype).view(streams.shape)

    return branch_input.to(streams.dtype).view(*streams.shape[:-2], -1), write_back
