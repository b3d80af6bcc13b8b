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

from .kernels_triton_gradients import gate_gradients, streams_gradient, weight_gradient, write_width_gradients
from .kernels_triton_language import (
    first_derivatives,
    jit,
    load_streams,
    plus_projected,
    read_rows,
    rounded,
    run,
    store_gates,
    sum_of_squares,
    tl,
    written,
    zeros,
)


# Above, a program cannot hold a tile of the streams and the weight that belongs to it.
LARGEST_STREAMS, LARGEST_OUTPUTS = 16, 128

# Of a program: tokens, which share the weight, and features of a stream at once.
FUSED_ROWS, FUSED_BLOCK = 8, 256


@jit
def _width(streams, weight, bias, alpha, branch_input, h_pre, h_post, logits, products, squares, rows, width, eps,
           n: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    product_sums, square_sum = zeros(K, ROWS), tl.zeros((ROWS,), tl.float32)
    for start in range(0, width, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = (row[:, None] < rows) & (c[None, :] < width)
        tiles = load_streams(streams, row[:, None] * (n * width) + c[None, :], inside, width, n)
        product_sums = plus_projected(product_sums, tiles, weight, c, width, n, K)
        square_sum += sum_of_squares(tiles, n)
    store_gates(product_sums, square_sum, bias, alpha, h_pre, h_post, logits, products, squares, row, rows, n, width,
                eps, K, PADDED)  # fmt: skip
    read_rows(streams, h_pre, branch_input, row, rows, width, n, BLOCK)


@jit
def _write_width(streams, h_res, h_post, branch_output, weight, bias, alpha, new_streams, branch_input, next_h_pre,
                 next_h_post, logits, products, squares, rows, width, eps, SUM_TO_ONE: tl.constexpr, n: tl.constexpr,
                 K: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = row < rows
    product_sums, square_sum = zeros(K, ROWS), tl.zeros((ROWS,), tl.float32)
    for start in range(0, width, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = present[:, None] & (c[None, :] < width)
        place = row[:, None] * (n * width) + c[None, :]
        tiles = load_streams(streams, place, inside, width, n)
        y = tl.load(branch_output + row[:, None] * width + c[None, :], mask=inside, other=0.0).to(tl.float32)
        seen = ()
        for i in tl.static_range(n):
            value = written(tiles, y, h_res, h_post, row, present, i, SUM_TO_ONE, n)
            stored = rounded(value, new_streams.dtype.element_ty)
            tl.store(new_streams + place + i * width, stored, mask=inside)
            # The next hyper-connection sees the streams as they are rounded.
            seen = seen + (stored.to(tl.float32),)
        product_sums = plus_projected(product_sums, seen, weight, c, width, n, K)
        square_sum += sum_of_squares(seen, n)
    store_gates(product_sums, square_sum, bias, alpha, next_h_pre, next_h_post, logits, products, squares, row, rows,
                n, width, eps, K, PADDED)  # fmt: skip
    read_rows(new_streams, next_h_pre, branch_input, row, rows, width, n, BLOCK)


def launch(streams: Tensor, outputs: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid and the constants of a fused kernel."""
    tokens, n, _ = streams.shape
    constants = {"n": n, "K": outputs, "PADDED": max(16, 1 << (outputs - 1).bit_length())}
    constants |= {"ROWS": FUSED_ROWS, "BLOCK": FUSED_BLOCK, "num_warps": 4}
    return (-(-tokens // FUSED_ROWS),), constants


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


def gradients_of_gates(grad_input, grad_h_post, grad_logits, saved, eps):
    """The gradients of products `[T, k]` and mean squares `[T]`; of weight, bias and alpha."""
    streams, _, alpha, h_pre, h_post, products, squares = saved
    grad_products, grad_squares, grad_bias, by_output = gate_gradients(
        grad_input, streams, h_pre, h_post, grad_h_post, grad_logits, products, squares, alpha, eps
    )
    n = streams.shape[1]
    grad_alpha = torch.stack([part.sum() for part in by_output.tensor_split([n, 2 * n])])
    return (grad_products, grad_squares), (weight_gradient(streams, grad_products), grad_bias, grad_alpha)


def _save_width(ctx, inputs, output):
    streams, weight, _, alpha, ctx.eps = inputs
    _, h_pre, h_post, _, products, squares = output
    ctx.save_for_backward(streams, weight, alpha, h_pre, h_post, products, squares)


def _width_gradients(ctx, grad_input, _, grad_h_post, grad_logits, *others):
    saved = ctx.saved_tensors
    of_tokens, of_parameters = gradients_of_gates(grad_input, grad_h_post, grad_logits, saved, ctx.eps)
    streams, weight, _, h_pre, *_ = saved
    grad_streams = streams_gradient(grad_input, False, grad_input, streams, h_pre, weight, *of_tokens)
    return grad_streams, *of_parameters, None


def _save_write_width(ctx, inputs, output):
    streams, h_res, h_post, branch_output, _, weight, _, alpha, ctx.eps = inputs
    new_streams, _, next_h_pre, next_h_post, _, products, squares = output
    written = (streams, h_res, h_post, branch_output)
    ctx.save_for_backward(*written, new_streams, weight, alpha, next_h_pre, next_h_post, products, squares)


def _write_width_gradients(ctx, grad_streams, grad_input, _, grad_h_post, grad_logits, *unused):
    # Under checkpointing they can be asked for once only.
    streams, h_res, h_post, branch_output, *saved = ctx.saved_tensors
    of_tokens, of_parameters = gradients_of_gates(grad_input, grad_h_post, grad_logits, saved, ctx.eps)
    new_streams, weight, _, next_h_pre, *_ = saved
    written = (streams, h_res, h_post, branch_output)
    read = (grad_input, new_streams, next_h_pre, weight)
    return *write_width_gradients(grad_streams, *read, *of_tokens, *written), None, *of_parameters, None


width.register_autograd(first_derivatives(_width_gradients), setup_context=_save_width)
write_width.register_autograd(first_derivatives(_write_width_gradients), setup_context=_save_write_width)
