# Code of kromhc-hf, which travels with every model that it saves.
"""Reads and writes the streams in Triton, in custom operators that torch.compile sees whole.

A program works on a few tokens and holds a tile of each stream, so that each pass moves every stream once: of memory
the read moves `(n + 1) C` elements per token, the write `(2n + 1) C`, their backward passes `(2n + 1) C` and
`(3n + 2) C`.
All sums are fp32. Without a GPU the kernels run in Triton's interpreter, with `TRITON_INTERPRET=1` in the environment.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
from torch import Tensor

from .kernels_triton_language import (
    ROWS,
    block_size,
    jit,
    load_numbers,
    load_streams,
    plus_products,
    rounded,
    run,
    store_numbers,
    sum_of,
    tl,
    weighted,
    write_gradients,
    written,
    zeros,
)


@jit
def _read(streams, h_pre, out, rows, width, n: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    present = row < rows
    inside = present[:, None] & (c[None, :] < width)
    weights = load_numbers(h_pre, row, present, n)
    tiles = load_streams(streams, row[:, None] * (n * width) + c[None, :], inside, width, n)
    value = weighted(tiles, weights, sum_of(weights, n), n)
    tl.store(out + row[:, None] * width + c[None, :], rounded(value, out.dtype.element_ty), mask=inside)


@jit
def _read_backward(grad, streams, h_pre, grad_streams, grad_h_pre, rows, width, n: tl.constexpr, ROWS: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = row < rows
    weights = load_numbers(h_pre, row, present, n)
    totals = zeros(n, ROWS)
    for start in range(0, width, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = present[:, None] & (c[None, :] < width)
        place = row[:, None] * (n * width) + c[None, :]
        g = tl.load(grad + row[:, None] * width + c[None, :], mask=inside, other=0.0).to(tl.float32)
        totals = plus_products(totals, load_streams(streams, place, inside, width, n), g, n)
        for j in tl.static_range(n):
            value = rounded(weights[j][:, None] * g, grad_streams.dtype.element_ty)
            tl.store(grad_streams + place + j * width, value, mask=inside)
    store_numbers(grad_h_pre, totals, row, present, n)


@jit
def _write(streams, h_res, h_post, branch_output, out, rows, width, SUM_TO_ONE: tl.constexpr, n: tl.constexpr,
           ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    present = row < rows
    inside = present[:, None] & (c[None, :] < width)
    place = row[:, None] * (n * width) + c[None, :]
    tiles = load_streams(streams, place, inside, width, n)
    y = tl.load(branch_output + row[:, None] * width + c[None, :], mask=inside, other=0.0).to(tl.float32)
    for i in tl.static_range(n):
        value = written(tiles, y, h_res, h_post, row, present, i, SUM_TO_ONE, n)
        tl.store(out + place + i * width, rounded(value, out.dtype.element_ty), mask=inside)


@jit
def _write_backward(grad, streams, h_res, h_post, branch_output, grad_streams, grad_h_res, grad_h_post, grad_output,
                    rows, width, n: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = row < rows
    matrix, post = load_numbers(h_res, row, present, n * n), load_numbers(h_post, row, present, n)
    matrix_sums, post_sums = zeros(n * n, ROWS), zeros(n, ROWS)
    for start in range(0, width, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = present[:, None] & (c[None, :] < width)
        grads = load_streams(grad, row[:, None] * (n * width) + c[None, :], inside, width, n)
        matrix_sums, post_sums = write_gradients(grads, streams, matrix, post, branch_output, grad_streams, grad_output,
                                                 matrix_sums, post_sums, row, c, inside, width, n)  # fmt: skip
    store_numbers(grad_h_res, matrix_sums, row, present, n * n)
    store_numbers(grad_h_post, post_sums, row, present, n)


def _sizes(
    streams: Tensor, rows: int, block: int, warps: int
) -> tuple[tuple[int, int], tuple[int, int], dict[str, int]]:
    """Grid, sizes and constants of programs that work on so many tokens and features each."""
    tokens, n, width = streams.shape
    grid = (-(-tokens // rows), -(-width // block))
    return grid, (tokens, width), {"n": n, "ROWS": rows, "BLOCK": block, "num_warps": warps}


@torch.library.custom_op("kromhc_hf::read", mutates_args=())
def read(streams: Tensor, h_pre: Tensor) -> Tensor:
    """`sum_j h_pre[j] streams[j]`: `[T, n, C]` and `[T, n]` -> `[T, C]`."""
    out = streams.new_empty(len(streams), streams.shape[2])
    grid, sizes, constants = _sizes(streams, ROWS, block_size(streams.shape[1]), ROWS)
    run(_read, grid, streams.contiguous(), h_pre.contiguous(), out, *sizes, **constants)
    return out


@read.register_fake
def _(streams, h_pre):
    return streams.new_empty(streams.shape[0], streams.shape[2])


@torch.library.custom_op("kromhc_hf::read_backward", mutates_args=())
def read_backward(grad: Tensor, streams: Tensor, h_pre: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the streams and of `h_pre`."""
    (programs, _), sizes, constants = _sizes(streams, ROWS, block_size(streams.shape[1]), ROWS)
    grad_streams = torch.empty(streams.shape, dtype=streams.dtype, device=streams.device)
    grad_h_pre = torch.empty(h_pre.shape, dtype=h_pre.dtype, device=h_pre.device)
    inputs = (tensor.contiguous() for tensor in (grad, streams, h_pre))
    run(_read_backward, (programs,), *inputs, grad_streams, grad_h_pre, *sizes, **constants)
    return grad_streams, grad_h_pre


@read_backward.register_fake
def _(grad, streams, h_pre):
    return streams.new_empty(streams.shape), h_pre.new_empty(h_pre.shape)


@torch.library.custom_op("kromhc_hf::write", mutates_args=())
def write(streams: Tensor, h_res: Tensor, h_post: Tensor, branch_output: Tensor, rows_sum_to_one: bool) -> Tensor:
    """`sum_j h_res[i, j] streams[j] + h_post[i] branch_output`, `[T, n, C]`."""
    # One token is enough work for four warps, and its mappings are loaded once.
    grid, sizes, constants = _sizes(streams, 1, 1024, 4)
    out = torch.empty(streams.shape, dtype=streams.dtype, device=streams.device)
    inputs = (tensor.contiguous() for tensor in (streams, h_res, h_post, branch_output))
    run(_write, grid, *inputs, out, *sizes, SUM_TO_ONE=rows_sum_to_one, **constants)
    return out


@write.register_fake
def _(streams, *others):
    return streams.new_empty(streams.shape)


@torch.library.custom_op("kromhc_hf::write_backward", mutates_args=())
def write_backward(
    grad: Tensor, streams: Tensor, h_res: Tensor, h_post: Tensor, branch_output: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the streams, `h_res`, `h_post` and the branch output, in one pass."""
    # A warp by itself: its sums over features need no other.
    (programs, _), sizes, constants = _sizes(streams, 1, 2 * block_size(streams.shape[1]), 1)
    inputs = [tensor.contiguous() for tensor in (grad, streams, h_res, h_post, branch_output)]
    outputs = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (streams, h_res, h_post, branch_output)]
    run(_write_backward, (programs,), *inputs, *outputs, *sizes, **constants)
    return outputs[0], outputs[1], outputs[2], outputs[3]


@write_backward.register_fake
def _(grad, streams, h_res, h_post, branch_output):
    made = [t.new_empty(t.shape) for t in (streams, h_res, h_post, branch_output)]
    return made[0], made[1], made[2], made[3]


def _save(ctx, inputs, output):
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))


def _read_gradients(ctx, grad):
    streams, h_pre = ctx.saved_tensors
    if not torch.is_grad_enabled():
        return read_backward(grad, streams, h_pre)
    # Somebody differentiates again: the same in operations that autograd knows.
    wide = grad.float().unsqueeze(1)
    return (h_pre.unsqueeze(-1) * wide).to(streams.dtype), (streams * wide).sum(-1)


def _write_gradients(ctx, grad):
    return *write_gradient(grad, *ctx.saved_tensors), None


def write_gradient(grad, streams, h_res, h_post, branch_output):
    if not torch.is_grad_enabled():
        return write_backward(grad, streams, h_res, h_post, branch_output)
    wide = grad.float()
    grad_streams = (h_res.unsqueeze(-1) * wide.unsqueeze(2)).sum(1).to(streams.dtype)
    grad_h_res = (wide.unsqueeze(2) * streams.unsqueeze(1)).sum(-1)
    grad_output = (h_post.unsqueeze(-1) * wide).sum(1).to(branch_output.dtype)
    return grad_streams, grad_h_res, (wide * branch_output.unsqueeze(1)).sum(-1), grad_output


read.register_autograd(_read_gradients, setup_context=_save)
write.register_autograd(_write_gradients, setup_context=_save)
