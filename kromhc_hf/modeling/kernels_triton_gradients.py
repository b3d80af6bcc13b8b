# Code of kromhc-hf, which travels with every model that it saves.
"""The gradients of a width connection in Triton: what it says about the read weights, the streams and the weight.

Between the first and the other two lies the gradient of the gates, on a few numbers per token. Of memory they move
`(n + 1) C`, `(2n + 1) C` (with the gradient that the streams have already `(3n + 1) C`) and `n C` elements per token.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
from torch import Tensor

from .kernels_triton_language import (
    PRECISION,
    ROWS,
    block_size,
    jit,
    load_numbers,
    load_streams,
    plus_products,
    rounded,
    run,
    store_numbers,
    tl,
    write_gradients,
    zeros,
)


FEATURES = 64
# Of a program that makes the gradient of the streams: tokens, which share the weight, and features of a stream.
GRADIENT_ROWS, GRADIENT_BLOCK = 16, 128
BOTH_ROWS, BOTH_BLOCK = 4, 256
# How many tokens one program sums the weight gradient over at least, and how many such sums there are at most.
SHARE, SHARES = 512, 32


@jit
def _gate_gradients(grad_input, streams, h_pre, h_post, grad_h_post, grad_logits, products, squares, alpha,
                    grad_products, grad_squares, bias_sums, output_sums, rows, width, eps, n: tl.constexpr,
                    K: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = row < rows
    totals = zeros(n, ROWS)
    for start in range(0, width, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = present[:, None] & (c[None, :] < width)
        g = tl.load(grad_input + row[:, None] * width + c[None, :], mask=inside, other=0.0).to(tl.float32)
        tiles = load_streams(streams, row[:, None] * (n * width) + c[None, :], inside, width, n)
        totals = plus_products(totals, tiles, g, n)
    k = tl.arange(0, PADDED)
    of_read, of_write = present[:, None] & (k[None, :] < n), present[:, None] & (k[None, :] >= n) & (k[None, :] < 2 * n)
    of_logits, some = present[:, None] & (k[None, :] >= 2 * n) & (k[None, :] < K), present[:, None] & (k[None, :] < K)
    pre = tl.load(h_pre + row[:, None] * n + k[None, :], mask=of_read, other=0.0)
    post = tl.load(h_post + row[:, None] * n + (k[None, :] - n), mask=of_write, other=0.0)
    grad = tl.load(grad_logits + row[:, None] * (K - 2 * n) + (k[None, :] - 2 * n), mask=of_logits, other=0.0)
    # h_post is twice a sigmoid.
    by_post = tl.load(grad_h_post + row[:, None] * n + (k[None, :] - n), mask=of_write, other=0.0)
    grad += by_post * post * (1.0 - post / 2)
    for j in tl.static_range(n):
        grad += tl.where(k[None, :] == j, totals[j][:, None], 0.0) * pre * (1.0 - pre)
    product = tl.load(products + row[:, None] * K + k[None, :], mask=some, other=0.0)
    scale = tl.rsqrt(tl.load(squares + row, mask=present, other=1.0) + eps)
    by_output = grad * scale[:, None]
    each = tl.where(k < n, tl.load(alpha), tl.where(k < 2 * n, tl.load(alpha + 1), tl.load(alpha + 2)))
    by_product = by_output * each[None, :]
    tl.store(grad_products + row[:, None] * K + k[None, :], by_product, mask=some)
    tl.store(grad_squares + row, tl.sum(by_product * product, axis=1) * scale * scale / -2, mask=present)
    place = tl.program_id(0).to(tl.int64) * K + k
    tl.store(bias_sums + place, tl.sum(grad, axis=0), mask=k < K)
    tl.store(output_sums + place, tl.sum(by_output * product, axis=0), mask=k < K)


@jit
def stream_gradient(known, g, streams, h_pre, weight, by_output, by_square, row, c, present, width, j: tl.constexpr,
                    ADD: tl.constexpr, n: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """The gradient of stream j, `[ROWS, BLOCK]` in fp32, and where it belongs."""
    inside = present[:, None] & (c[None, :] < width)
    place = row[:, None] * (n * width) + j * width + c[None, :]
    x = tl.load(streams + place, mask=inside, other=0.0).to(tl.float32)
    read = tl.load(h_pre + row * n + j, mask=present, other=0.0)
    value = read[:, None] * g + by_square[:, None] * x
    for k in tl.static_range(K):
        w = tl.load(weight + (k * n + j) * width + c, mask=c < width, other=0.0)
        value += by_output[k][:, None] * w[None, :]
    if ADD:
        value += tl.load(known + place, mask=inside, other=0.0).to(tl.float32)
    return value


@jit
def _streams_gradient(known, grad_input, streams, h_pre, weight, grad_products, grad_squares, out, rows, width,
                      ADD: tl.constexpr, n: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    present = row < rows
    inside = present[:, None] & (c[None, :] < width)
    by_output = load_numbers(grad_products, row, present, K)
    # The mean square is over all features.
    by_square = tl.load(grad_squares + row, mask=present, other=0.0) * (2 / (n * width))
    g = tl.load(grad_input + row[:, None] * width + c[None, :], mask=inside, other=0.0).to(tl.float32)
    for j in tl.static_range(n):
        value = stream_gradient(known, g, streams, h_pre, weight, by_output, by_square, row, c, present, width, j, ADD,
                                n, K)  # fmt: skip
        place = row[:, None] * (n * width) + j * width + c[None, :]
        tl.store(out + place, rounded(value, out.dtype.element_ty), mask=inside)


@jit
def _write_width_gradients(known, grad_input, new_streams, h_pre, weight, grad_products, grad_squares, streams, h_res,
                           h_post, branch_output, grad_streams, grad_h_res, grad_h_post, grad_output, rows, width,
                           n: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = row < rows
    matrix, post = load_numbers(h_res, row, present, n * n), load_numbers(h_post, row, present, n)
    by_output = load_numbers(grad_products, row, present, K)
    by_square = tl.load(grad_squares + row, mask=present, other=0.0) * (2 / (n * width))
    matrix_sums, post_sums = zeros(n * n, ROWS), zeros(n, ROWS)
    for start in range(0, width, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = present[:, None] & (c[None, :] < width)
        g = tl.load(grad_input + row[:, None] * width + c[None, :], mask=inside, other=0.0).to(tl.float32)
        grads = ()
        for j in tl.static_range(n):
            value = stream_gradient(known, g, new_streams, h_pre, weight, by_output, by_square, row, c, present, width,
                                    j, True, n, K)  # fmt: skip
            grads = grads + (value,)
        matrix_sums, post_sums = write_gradients(grads, streams, matrix, post, branch_output, grad_streams, grad_output,
                                                 matrix_sums, post_sums, row, c, inside, width, n)  # fmt: skip
    store_numbers(grad_h_res, matrix_sums, row, present, n * n)
    store_numbers(grad_h_post, post_sums, row, present, n)


@jit
def _weight_gradient(streams, grad_products, out, rows, features, share, K: tl.constexpr, PADDED: tl.constexpr,
                     TOKENS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    c, k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PADDED)
    first = tl.program_id(1).to(tl.int64) * share
    total = tl.zeros((PADDED, BLOCK), tl.float32)
    for start in range(0, share, TOKENS):
        row = first + start + tl.arange(0, TOKENS)
        inside = (row[:, None] < rows) & (c[None, :] < features)
        x = tl.load(streams + row[:, None] * features + c[None, :], mask=inside, other=0.0).to(tl.float32)
        some = (row[None, :] < rows) & (k[:, None] < K)
        g = tl.load(grad_products + row[None, :] * K + k[:, None], mask=some, other=0.0)
        total += tl.dot(g, x, input_precision=PRECISION)
    place = tl.program_id(1).to(tl.int64) * K * features + k[:, None] * features + c[None, :]
    tl.store(out + place, total, mask=(k[:, None] < K) & (c[None, :] < features))


def _sizes(outputs: int) -> tuple[int, int]:
    """The outputs of the projection, filled up, and how many tokens one matrix product takes without spilling."""
    padded = max(16, 1 << (outputs - 1).bit_length())
    return padded, 32 if padded <= 64 else 16


@torch.library.custom_op("kromhc_hf::gate_gradients", mutates_args=())
def gate_gradients(
    grad_input: Tensor,
    streams: Tensor,
    h_pre: Tensor,
    h_post: Tensor,
    grad_h_post: Tensor,
    grad_logits: Tensor,
    products: Tensor,
    squares: Tensor,
    alpha: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of products `[T, k]`, mean squares `[T]`, bias `[k]` and of alpha by output `[k]`.

    What the branch input `[T, C]` says about the read weights is `sum_c grad_input[c] streams[j, c]`.
    """
    tokens, n, width = streams.shape
    outputs = products.shape[1]
    programs, (padded, _) = -(-tokens // ROWS), _sizes(outputs)
    made = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (products, squares)]
    sums = [products.new_empty(programs, outputs) for _ in range(2)]
    inputs = (grad_input, streams, h_pre, h_post, grad_h_post, grad_logits, products, squares, alpha)
    constants = {"n": n, "K": outputs, "PADDED": padded, "ROWS": ROWS, "BLOCK": block_size(n), "num_warps": ROWS}
    contiguous = (tensor.contiguous() for tensor in inputs)
    run(_gate_gradients, (programs,), *contiguous, *made, *sums, tokens, width, eps, **constants)
    return made[0], made[1], sums[0].sum(0), sums[1].sum(0)


@gate_gradients.register_fake
def _(grad_input, streams, h_pre, h_post, grad_h_post, grad_logits, products, squares, alpha, eps):
    outputs = products.shape[1]
    made = products.new_empty(products.shape), squares.new_empty(squares.shape)
    return *made, products.new_empty(outputs), products.new_empty(outputs)


@torch.library.custom_op("kromhc_hf::streams_gradient", mutates_args=())
def streams_gradient(
    known: Tensor,
    add: bool,
    grad_input: Tensor,
    streams: Tensor,
    h_pre: Tensor,
    weight: Tensor,
    grad_products: Tensor,
    grad_squares: Tensor,
) -> Tensor:
    """What reading, projection and norm say about the streams `[T, n, C]`, added to `known` if `add`."""
    tokens, n, width = streams.shape
    out, outputs = torch.empty(streams.shape, dtype=streams.dtype, device=streams.device), weight.shape[0]
    inputs = (known, grad_input, streams, h_pre, weight, grad_products, grad_squares)
    constants = {"ADD": add, "n": n, "K": outputs, "ROWS": GRADIENT_ROWS, "BLOCK": GRADIENT_BLOCK, "num_warps": 4}
    grid = (-(-tokens // GRADIENT_ROWS), -(-width // GRADIENT_BLOCK))
    run(_streams_gradient, grid, *(tensor.contiguous() for tensor in inputs), out, tokens, width, **constants)
    return out


@streams_gradient.register_fake
def _(known, add, grad_input, streams, *others):
    return streams.new_empty(streams.shape)


@torch.library.custom_op("kromhc_hf::write_width_gradients", mutates_args=())
def write_width_gradients(
    known: Tensor,
    grad_input: Tensor,
    new_streams: Tensor,
    h_pre: Tensor,
    weight: Tensor,
    grad_products: Tensor,
    grad_squares: Tensor,
    streams: Tensor,
    h_res: Tensor,
    h_post: Tensor,
    branch_output: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`write_backward` of the gradient that `streams_gradient` adds to `known`, which never is in memory."""
    tokens, n, width = streams.shape
    inputs = (known, grad_input, new_streams, h_pre, weight, grad_products, grad_squares)
    written = (streams, h_res, h_post, branch_output)
    outputs = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in written]
    constants = {"n": n, "K": weight.shape[0], "ROWS": BOTH_ROWS, "BLOCK": BOTH_BLOCK, "num_warps": 4}
    contiguous = (tensor.contiguous() for tensor in (*inputs, *written))
    run(_write_width_gradients, (-(-tokens // BOTH_ROWS),), *contiguous, *outputs, tokens, width, **constants)
    return outputs[0], outputs[1], outputs[2], outputs[3]


@write_width_gradients.register_fake
def _(known, grad_input, new_streams, h_pre, weight, grad_products, grad_squares, *written):
    made = [t.new_empty(t.shape) for t in written]
    return made[0], made[1], made[2], made[3]


@torch.library.custom_op("kromhc_hf::weight_gradient", mutates_args=())
def weight_gradient(streams: Tensor, grad_products: Tensor) -> Tensor:
    """`sum_t grad_products[t] streams[t]`: `[T, n, C]` and `[T, k]` -> `[k, n C]`."""
    tokens, outputs = grad_products.shape
    features = streams.shape[1] * streams.shape[2]
    padded, together = _sizes(outputs)
    share = max(SHARE, together * -(-tokens // (together * SHARES)))
    shares = -(-tokens // share)
    out = streams.new_empty(shares, outputs, features, dtype=torch.float32)
    grid, inputs = (-(-features // FEATURES), shares), (streams.contiguous(), grad_products.contiguous())
    constants = (outputs, padded, together, FEATURES)
    run(_weight_gradient, grid, *inputs, out, tokens, features, share, *constants, num_stages=2)
    return out.sum(0)


@weight_gradient.register_fake
def _(streams, grad_products):
    features = streams.shape[1] * streams.shape[2]
    return streams.new_empty(grad_products.shape[1], features, dtype=torch.float32)
