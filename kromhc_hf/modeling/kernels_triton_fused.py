# Code of kromhc-hf, which travels with every model that it saves.
"""The width connection as one Triton kernel, and together with the depth connection before it as one as well.

Norm, projection, gates and read of a block of tokens: a program reads the streams of 16 tokens twice, the second time
from the cache as far as it still has them. Of memory it moves `(n + 1) C` elements per token, where projecting and
reading apart move `(2n + 1) C`. A program that writes the streams first keeps them for the projection, which saves
reading them again. The gradient of the gates is in closed form.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
from torch import Tensor

from .kernels_triton import write_backward
from .kernels_triton_gradients import gate_gradients, streams_gradient, weight_gradient
from .kernels_triton_language import (
    TOKENS,
    first_derivatives,
    jit,
    load_streams,
    project_tile,
    read_rows,
    rounded,
    run,
    store_gates,
    tl,
    written,
)


# Above, a program cannot hold a tile of the streams and the weight that belongs to it.
LARGEST_STREAMS, LARGEST_OUTPUTS = 16, 128

# Features of a tile of one stream.
BLOCK = 128


@jit
def _width(streams, weight, bias, alpha, branch_input, h_pre, h_post, logits, products, squares, rows, width, eps,
           n: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    products_sum = tl.zeros((TOKENS, PADDED), tl.float32)
    square_sums = tl.zeros((TOKENS, BLOCK), tl.float32)
    for start in range(0, width, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = (row[:, None] < rows) & (c[None, :] < width)
        tiles = load_streams(streams, row[:, None] * (n * width) + c[None, :], inside, width, n)
        for j in tl.static_range(n):
            products_sum += project_tile(tiles[j], weight + j * width, c, width, n * width, K, PADDED)
            square_sums += tiles[j] * tiles[j]
    store_gates(products_sum, tl.sum(square_sums, axis=1), bias, alpha, h_pre, h_post, logits, products, squares, row,
                rows, n, width, eps, K, PADDED)  # fmt: skip
    read_rows(streams, h_pre, branch_input, row, rows, width, n, BLOCK)


@jit
def _write_width(streams, h_res, h_post, branch_output, weight, bias, alpha, new_streams, branch_input, next_h_pre,
                 next_h_post, logits, products, squares, rows, width, eps, SUM_TO_ONE: tl.constexpr, n: tl.constexpr,
                 K: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    present = row < rows
    products_sum = tl.zeros((TOKENS, PADDED), tl.float32)
    square_sums = tl.zeros((TOKENS, BLOCK), tl.float32)
    for start in range(0, width, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = present[:, None] & (c[None, :] < width)
        place = row[:, None] * (n * width) + c[None, :]
        tiles = load_streams(streams, place, inside, width, n)
        y = tl.load(branch_output + row[:, None] * width + c[None, :], mask=inside, other=0.0).to(tl.float32)
        for i in tl.static_range(n):
            value = written(tiles, y, h_res, h_post, row, present, i, SUM_TO_ONE, n)
            stored = rounded(value, new_streams.dtype.element_ty)
            tl.store(new_streams + place + i * width, stored, mask=inside)
            # The next hyper-connection sees the streams as they are rounded.
            seen = stored.to(tl.float32)
            products_sum += project_tile(seen, weight + i * width, c, width, n * width, K, PADDED)
            square_sums += seen * seen
    store_gates(products_sum, tl.sum(square_sums, axis=1), bias, alpha, next_h_pre, next_h_post, logits, products,
                squares, row, rows, n, width, eps, K, PADDED)  # fmt: skip
    read_rows(new_streams, next_h_pre, branch_input, row, rows, width, n, BLOCK)


def launch(streams: Tensor, outputs: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid and the constants of a fused kernel."""
    tokens, n, _ = streams.shape
    padded = max(16, 1 << (outputs - 1).bit_length())
    constants = {"n": n, "K": outputs, "PADDED": padded, "TOKENS": TOKENS, "BLOCK": BLOCK}
    return (-(-tokens // TOKENS),), constants | {"num_warps": 4, "num_stages": 2}


def width_outputs(streams: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """What a width connection makes, still empty: branch input, h_pre, h_post, logits, products, mean squares."""
    tokens, n, _ = streams.shape
    outputs = weight.shape[0]
    sizes = ((tokens, n), (tokens, n), (tokens, outputs - 2 * n), (tokens, outputs), (tokens,))
    branch_input = streams.new_empty(tokens, streams.shape[2])
    return branch_input, *(streams.new_empty(size, dtype=torch.float32) for size in sizes)


@torch.library.custom_op("kromhc_hf::width", mutates_args=())
def width(
    streams: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The width connection of streams `[T, n, C]` with weight `[k, n C]`, bias `[k]` and alpha `[3]`.

    Returns:
        The branch input `[T, C]`, h_pre and h_post `[T, n]`, the residual logits; products `[T, k]` and mean squares
        `[T]` for the gradient. The gradients of h_pre, products and mean squares are not passed on.
    """
    made = width_outputs(streams, weight)
    grid, constants = launch(streams, weight.shape[0])
    inputs = (tensor.contiguous() for tensor in (streams, weight, bias, alpha))
    run(_width, grid, *inputs, *made, streams.shape[0], streams.shape[2], eps, **constants)
    return made


@width.register_fake
def _(streams, weight, *others):
    return width_outputs(streams, weight)


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
def _(streams, h_res, h_post, branch_output, rows_sum_to_one, weight, *others):
    return streams.new_empty(streams.shape), *width_outputs(streams, weight)


def width_gradients(
    known: Tensor | None,
    grad_input: Tensor,
    grad_h_post: Tensor,
    grad_logits: Tensor,
    saved: tuple[Tensor, ...],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the streams, added to what is `known` of it, and of weight, bias and alpha."""
    streams, weight, alpha, h_pre, h_post, products, squares = saved
    grad_products, grad_squares, grad_bias, by_output = gate_gradients(
        grad_input, streams, h_pre, h_post, grad_h_post, grad_logits, products, squares, alpha, eps
    )
    n = streams.shape[1]
    grad_alpha = torch.stack([part.sum() for part in by_output.tensor_split([n, 2 * n])])
    grad_streams = streams_gradient(
        grad_input if known is None else known, known is not None, grad_input, streams, h_pre, weight, grad_products,
        grad_squares,
    )  # fmt: skip
    return grad_streams, weight_gradient(streams, grad_products), grad_bias, grad_alpha


def _save_width(ctx, inputs, output):
    streams, weight, _, alpha, ctx.eps = inputs
    _, h_pre, h_post, _, products, squares = output
    ctx.save_for_backward(streams, weight, alpha, h_pre, h_post, products, squares)


def _width_gradients(ctx, grad_input, _, grad_h_post, grad_logits, *others):
    return *width_gradients(None, grad_input, grad_h_post, grad_logits, ctx.saved_tensors, ctx.eps), None


def _save_write_width(ctx, inputs, output):
    streams, h_res, h_post, branch_output, _, weight, _, alpha, ctx.eps = inputs
    new_streams, _, next_h_pre, next_h_post, _, products, squares = output
    written = (streams, h_res, h_post, branch_output)
    ctx.save_for_backward(*written, new_streams, weight, alpha, next_h_pre, next_h_post, products, squares)


def _write_width_gradients(ctx, grad_streams, grad_input, _, grad_h_post, grad_logits, *unused):
    # Under checkpointing they can be asked for once only.
    saved = ctx.saved_tensors
    grad_streams, *others = width_gradients(grad_streams, grad_input, grad_h_post, grad_logits, saved[4:], ctx.eps)
    return *write_backward(grad_streams, *saved[:4]), None, *others, None


width.register_autograd(first_derivatives(_width_gradients), setup_context=_save_width)
write_width.register_autograd(first_derivatives(_write_width_gradients), setup_context=_save_write_width)
