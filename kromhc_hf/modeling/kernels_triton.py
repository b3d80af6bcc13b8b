# Code of kromhc-hf, which travels with every model that it saves.
"""The passes over the streams as Triton kernels, registered as custom operators that torch.compile sees whole.

One program works on one token (the projection: on 16), so that each pass moves every stream once: of memory the
projection and the read move `n C` and `(n + 1) C` elements per token, the write `(2n + 1) C`, the backward passes of
read and write `(2n + 1) C` and `(3n + 2) C`. All sums are fp32. Without a GPU the kernels run in Triton's interpreter,
with `TRITON_INTERPRET=1` in the environment.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
from torch import Tensor

from .kernels_triton_language import PRECISION, TOKENS, first_derivatives, jit, rounded, run, snapped, tl


DEPTH = 64
# A wider weight is projected by several programs.
OUTPUTS = 64


@jit
def _project(streams, weight, products, squares, rows, width, K: tl.constexpr, PADDED: tl.constexpr,
             TOKENS: tl.constexpr, DEPTH: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    output = tl.program_id(1) * PADDED + tl.arange(0, PADDED)
    products_sum = tl.zeros((TOKENS, PADDED), tl.float32)
    square_sum = tl.zeros((TOKENS,), tl.float32)
    for start in range(0, width, DEPTH):
        c = start + tl.arange(0, DEPTH)
        inside = (row[:, None] < rows) & (c[None, :] < width)
        x = tl.load(streams + row[:, None] * width + c[None, :], mask=inside, other=0.0).to(tl.float32)
        w_inside = (output[:, None] < K) & (c[None, :] < width)
        w = tl.load(weight + output[:, None] * width + c[None, :], mask=w_inside, other=0.0)
        products_sum += tl.dot(x, tl.trans(w), input_precision=PRECISION)
        square_sum += tl.sum(x * x, axis=1)
    inside = (row[:, None] < rows) & (output[None, :] < K)
    tl.store(products + row[:, None] * K + output[None, :], products_sum, mask=inside)
    tl.store(squares + row, square_sum / width, mask=row < rows)


@jit
def _read(streams, h_pre, out, n, width, N: tl.constexpr, BLOCK: tl.constexpr):
    token, j = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    weights = tl.load(h_pre + token * n + j, mask=j < n, other=0.0)
    total = tl.sum(weights, axis=0)
    total = snapped(total)
    base = streams + token * n * width
    for start in range(0, width, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = (j[:, None] < n) & (c[None, :] < width)
        x = tl.load(base + j[:, None] * width + c[None, :], mask=inside, other=0.0).to(tl.float32)
        first = tl.load(base + c, mask=c < width, other=0.0).to(tl.float32)
        value = total * first + tl.sum(weights[:, None] * (x - first[None, :]), axis=0)
        tl.store(out + token * width + c, rounded(value, out.dtype.element_ty), mask=c < width)


@jit
def _read_backward(grad, streams, h_pre, grad_streams, grad_h_pre, n, width, N: tl.constexpr, BLOCK: tl.constexpr):
    token, j = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    weights = tl.load(h_pre + token * n + j, mask=j < n, other=0.0)
    total = tl.zeros((N,), tl.float32)
    base = token * n * width
    for start in range(0, width, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = (j[:, None] < n) & (c[None, :] < width)
        place = base + j[:, None] * width + c[None, :]
        x = tl.load(streams + place, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + token * width + c, mask=c < width, other=0.0).to(tl.float32)
        total += tl.sum(x * g[None, :], axis=1)
        value = weights[:, None] * g[None, :]
        tl.store(grad_streams + place, rounded(value, grad_streams.dtype.element_ty), mask=inside)
    tl.store(grad_h_pre + token * n + j, total, mask=j < n)


@jit
def _write(streams, h_res, h_post, branch_output, out, n, width, SUM_TO_ONE: tl.constexpr, N: tl.constexpr,
           BLOCK: tl.constexpr):  # fmt: skip
    token, i = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    square = (i[:, None] < n) & (i[None, :] < n)
    matrix = tl.load(h_res + token * n * n + i[:, None] * n + i[None, :], mask=square, other=0.0)
    post = tl.load(h_post + token * n + i, mask=i < n, other=0.0)
    total = tl.sum(matrix, axis=1)
    total = snapped(total)
    if SUM_TO_ONE:
        total = tl.full((N,), 1.0, tl.float32)
    base = token * n * width
    for start in range(0, width, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = (i[:, None] < n) & (c[None, :] < width)
        place = base + i[:, None] * width + c[None, :]
        x = tl.load(streams + place, mask=inside, other=0.0).to(tl.float32)
        first = tl.load(streams + base + c, mask=c < width, other=0.0).to(tl.float32)
        y = tl.load(branch_output + token * width + c, mask=c < width, other=0.0).to(tl.float32)
        others = tl.sum(matrix[:, :, None] * (x - first[None, :])[None, :, :], axis=1)
        value = total[:, None] * first[None, :] + others + post[:, None] * y[None, :]
        tl.store(out + place, rounded(value, out.dtype.element_ty), mask=inside)


@jit
def _write_backward(grad, streams, h_res, h_post, branch_output, grad_streams, grad_h_res, grad_h_post, grad_output,
                    n, width, N: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    token, i = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    square = (i[:, None] < n) & (i[None, :] < n)
    entry = token * n * n + i[:, None] * n + i[None, :]
    matrix = tl.load(h_res + entry, mask=square, other=0.0)
    post = tl.load(h_post + token * n + i, mask=i < n, other=0.0)
    matrix_sum = tl.zeros((N, N), tl.float32)
    post_sum = tl.zeros((N,), tl.float32)
    base = token * n * width
    for start in range(0, width, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = (i[:, None] < n) & (c[None, :] < width)
        place = base + i[:, None] * width + c[None, :]
        g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(streams + place, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(branch_output + token * width + c, mask=c < width, other=0.0).to(tl.float32)
        matrix_sum += tl.sum(g[:, None, :] * x[None, :, :], axis=2)
        post_sum += tl.sum(g * y[None, :], axis=1)
        mixed = tl.sum(matrix[:, :, None] * g[:, None, :], axis=0)
        tl.store(grad_streams + place, rounded(mixed, grad_streams.dtype.element_ty), mask=inside)
        value = tl.sum(post[:, None] * g, axis=0)
        tl.store(grad_output + token * width + c, rounded(value, grad_output.dtype.element_ty), mask=c < width)
    tl.store(grad_h_res + entry, matrix_sum, mask=square)
    tl.store(grad_h_post + token * n + i, post_sum, mask=i < n)


def _sizes(streams: Tensor) -> tuple[int, int, int, int]:
    """n, C, n rounded up to a power of 2, and at how many features a program works at once."""
    n, width = streams.shape[-2:]
    padded = 1 << (n - 1).bit_length()
    # A matrix times so many features should stay in registers.
    return n, width, padded, max(16, min(128, 4096 // padded**2))


@torch.library.custom_op("kromhc_hf::project", mutates_args=())
def project(streams: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Products `[T, G, k]` and mean squares `[T, G]` of streams `[T, n, C]` and weight `[k, n * C / G]`."""
    outputs, width = weight.shape
    groups = streams.shape[1] * streams.shape[2] // width
    rows = len(streams) * groups
    products = streams.new_empty(len(streams), groups, outputs, dtype=torch.float32)
    squares = streams.new_empty(products.shape[:2], dtype=torch.float32)
    padded = min(OUTPUTS, max(16, 1 << (outputs - 1).bit_length()))
    grid = (-(-rows // TOKENS), -(-outputs // padded))
    inputs = (streams.contiguous(), weight.contiguous())
    run(_project, grid, *inputs, products, squares, rows, width, outputs, padded, TOKENS, DEPTH)
    return products, squares


@project.register_fake
def _(streams, weight):
    groups = streams.shape[1] * streams.shape[2] // weight.shape[1]
    products = streams.new_empty(streams.shape[0], groups, weight.shape[0], dtype=torch.float32)
    return products, streams.new_empty(streams.shape[0], groups, dtype=torch.float32)


@torch.library.custom_op("kromhc_hf::read", mutates_args=())
def read(streams: Tensor, h_pre: Tensor) -> Tensor:
    """`sum_j h_pre[j] streams[j]`: `[T, n, C]` and `[T, n]` -> `[T, C]`."""
    n, width, *sizes = _sizes(streams)
    out = streams.new_empty(len(streams), width)
    run(_read, (len(streams),), streams.contiguous(), h_pre.contiguous(), out, n, width, *sizes)
    return out


@read.register_fake
def _(streams, h_pre):
    return streams.new_empty(streams.shape[0], streams.shape[2])


@torch.library.custom_op("kromhc_hf::read_backward", mutates_args=())
def read_backward(grad: Tensor, streams: Tensor, h_pre: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the streams and of `h_pre`."""
    n, width, *sizes = _sizes(streams)
    grad_streams = torch.empty(streams.shape, dtype=streams.dtype, device=streams.device)
    grad_h_pre = torch.empty(h_pre.shape, dtype=h_pre.dtype, device=h_pre.device)
    inputs = (tensor.contiguous() for tensor in (grad, streams, h_pre))
    run(_read_backward, (len(streams),), *inputs, grad_streams, grad_h_pre, n, width, *sizes)
    return grad_streams, grad_h_pre


@read_backward.register_fake
def _(grad, streams, h_pre):
    return streams.new_empty(streams.shape), h_pre.new_empty(h_pre.shape)


@torch.library.custom_op("kromhc_hf::write", mutates_args=())
def write(streams: Tensor, h_res: Tensor, h_post: Tensor, branch_output: Tensor, rows_sum_to_one: bool) -> Tensor:
    """`sum_j h_res[i, j] streams[j] + h_post[i] branch_output`, `[T, n, C]`."""
    n, width, *sizes = _sizes(streams)
    out = torch.empty(streams.shape, dtype=streams.dtype, device=streams.device)
    inputs = (tensor.contiguous() for tensor in (streams, h_res, h_post, branch_output))
    run(_write, (len(streams),), *inputs, out, n, width, rows_sum_to_one, *sizes)
    return out


@write.register_fake
def _(streams, *others):
    return streams.new_empty(streams.shape)


@torch.library.custom_op("kromhc_hf::write_backward", mutates_args=())
def write_backward(
    grad: Tensor, streams: Tensor, h_res: Tensor, h_post: Tensor, branch_output: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the streams, `h_res`, `h_post` and the branch output, in one pass."""
    n, width, *sizes = _sizes(streams)
    inputs = [tensor.contiguous() for tensor in (grad, streams, h_res, h_post, branch_output)]
    outputs = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (streams, h_res, h_post, branch_output)]
    run(_write_backward, (len(streams),), *inputs, *outputs, n, width, *sizes)
    return outputs[0], outputs[1], outputs[2], outputs[3]


@write_backward.register_fake
def _(grad, streams, h_res, h_post, branch_output):
    made = [t.new_empty(t.shape) for t in (streams, h_res, h_post, branch_output)]
    return made[0], made[1], made[2], made[3]


def _save(ctx, inputs, output):
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))


def _project_gradients(ctx, grad_products, grad_squares):
    streams, weight = ctx.saved_tensors
    width = weight.shape[1]
    rows, grad = streams.reshape(-1, width).float(), grad_products.flatten(0, 1)
    grad_rows = torch.addcmul(grad @ weight, grad_squares.reshape(-1, 1) * 2 / width, rows)
    return grad_rows.view(streams.shape).to(streams.dtype), grad.t() @ rows


def _read_gradients(ctx, grad):
    return read_backward(grad, *ctx.saved_tensors)


def _write_gradients(ctx, grad):
    return *write_backward(grad, *ctx.saved_tensors), None


project.register_autograd(first_derivatives(_project_gradients), setup_context=_save)
read.register_autograd(first_derivatives(_read_gradients), setup_context=_save)
write.register_autograd(first_derivatives(_write_gradients), setup_context=_save)
