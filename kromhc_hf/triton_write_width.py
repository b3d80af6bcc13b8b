"""A depth connection and the width connection behind it as one Triton kernel.

A program writes the new streams of 16 tokens, projects them on the way and reads them once more from the cache: of
memory it moves `(2n + 2) C` elements per token, where writing and the fused width connection apart move `(3n + 2) C`.
"""

# mypy: ignore-errors
# (the language of kernels is not Python, and its types are not types)

# Triton reads annotations as text, and without Triton there would be nothing to evaluate them with.
from __future__ import annotations

import torch
from torch import Tensor

from .triton_kernels import write_backward
from .triton_language import jit, project_tile, read_rows, rounded, run, snapped, store_gates, tl
from .triton_width import launch, width_gradients, width_outputs


@jit
def _write_width(streams, h_res, h_post, branch_output, weight, bias, alpha, new_streams, branch_input, next_h_pre,
                 next_h_post, logits, products, squares, rows, width, eps, SUM_TO_ONE: tl.constexpr, n: tl.constexpr,
                 K: tl.constexpr, N: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    i = tl.arange(0, N)
    some = (row[:, None] < rows) & (i[None, :] < n)
    matrix = h_res + row[:, None] * (n * n) + i[None, :] * n
    post = tl.load(h_post + row[:, None] * n + i[None, :], mask=some, other=0.0)
    total = tl.load(matrix, mask=some, other=0.0)
    for j in tl.static_range(1, n):
        total += tl.load(matrix + j, mask=some, other=0.0)
    total = snapped(total)
    if SUM_TO_ONE:
        total = tl.where(some, 1.0, 0.0)
    products_sum = tl.zeros((TOKENS, PADDED), tl.float32)
    square_sum = tl.zeros((TOKENS,), tl.float32)
    for start in range(0, width, TILE):
        c = start + tl.arange(0, TILE)
        present = (row[:, None] < rows) & (c[None, :] < width)
        source = streams + row[:, None] * (n * width) + c[None, :]
        first = tl.load(source, mask=present, other=0.0).to(tl.float32)
        y = tl.load(branch_output + row[:, None] * width + c[None, :], mask=present, other=0.0).to(tl.float32)
        value = total[:, :, None] * first[:, None, :]
        for j in tl.static_range(1, n):
            x = tl.load(source + j * width, mask=present, other=0.0).to(tl.float32)
            column = tl.load(matrix + j, mask=some, other=0.0)
            value += column[:, :, None] * (x - first)[:, None, :]
        value += post[:, :, None] * y[:, None, :]
        stored = rounded(value, new_streams.dtype.element_ty)
        inside = some[:, :, None] & (c[None, None, :] < width)
        place = row[:, None, None] * (n * width) + i[None, :, None] * width + c[None, None, :]
        tl.store(new_streams + place, stored, mask=inside)
        # The next hyper-connection sees the streams as they are rounded.
        more_products, more_squares = project_tile(
            stored.to(tl.float32), weight, i, c, n, width, K, N, PADDED, TOKENS, TILE
        )
        products_sum += more_products
        square_sum += more_squares
    store_gates(products_sum, square_sum, bias, alpha, next_h_pre, next_h_post, logits, products, squares, row, rows,
                n, width, eps, K, PADDED)  # fmt: skip
    read_rows(new_streams, next_h_pre, branch_input, row, rows, width, n, BLOCK)


@torch.library.custom_op("kromhc_hf::write_width", mutates_args=())
def write_width(
    streams: Tensor,
    h_res: Tensor,
    h_post: Tensor,
    branch_output: Tensor,
    rows_sum_to_one: bool,
    weight: Tensor,
    bias: Tensor,
    alpha: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The new streams `[T, n, C]` as by `write`, and their width connection as by `width`.

    The gradients of the new h_pre, products and mean squares are not passed on.
    """
    new_streams = torch.empty(streams.shape, dtype=streams.dtype, device=streams.device)
    made = width_outputs(streams, weight)
    grid, constants = launch(streams, weight.shape[0])
    inputs = (tensor.contiguous() for tensor in (streams, h_res, h_post, branch_output, weight, bias, alpha))
    sizes = (streams.shape[0], streams.shape[2], eps)
    run(_write_width, grid, *inputs, new_streams, *made, *sizes, SUM_TO_ONE=rows_sum_to_one, **constants)
    return new_streams, *made


@write_width.register_fake
def _(
    streams: Tensor,
    h_res: Tensor,
    h_post: Tensor,
    branch_output: Tensor,
    rows_sum_to_one: bool,
    weight: Tensor,
    bias: Tensor,
    alpha: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return streams.new_empty(streams.shape), *width_outputs(streams, weight)


def _save(ctx, inputs, output):
    streams, h_res, h_post, branch_output, _, weight, _, alpha, ctx.eps = inputs
    new_streams, _, next_h_pre, next_h_post, _, products, squares = output
    written = (streams, h_res, h_post, branch_output)
    ctx.save_for_backward(*written, new_streams, weight, alpha, next_h_pre, next_h_post, products, squares)


def _gradients(ctx, grad_streams, grad_input, _, grad_h_post, grad_logits, *unused):
    # Under checkpointing they can be asked for once only.
    saved = ctx.saved_tensors
    grad_streams, *others = width_gradients(grad_streams, grad_input, grad_h_post, grad_logits, saved[4:], ctx.eps)
    return *write_backward(grad_streams, *saved[:4]), None, *others, None


write_width.register_autograd(_gradients, setup_context=_save)
