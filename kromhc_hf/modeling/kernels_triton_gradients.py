# Code of kromhc-hf, which travels with every model that it saves.
"""The gradients of the thin product of the streams with the weight of the mappings, and of its gates, in Triton.

Of memory those of the gates move `(n + 1) C` elements per token, that of the weight `n C`, and that of the streams
`(3n + 1) C`, with what is known of it already.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
from torch import Tensor

from .kernels_triton_language import (
    PARTS,
    PRECISION,
    ROWS,
    block_size,
    jit,
    load_streams,
    narrow_dot,
    padded_outputs,
    plus_products,
    rounded,
    run,
    tl,
    zeros,
)


# How many tokens one program sums the weight gradient over at least, and how many such sums there are at most.
SHARE, SHARES = 1024, 32


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
def _streams_gradient(known, grad_input, streams, h_pre, weight, grad_products, grad_squares, out, rows, width,
                      KNOWN: tl.constexpr, READ: tl.constexpr, PRECISION: tl.constexpr, n: tl.constexpr,
                      K: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    c, k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PADDED)
    present = row < rows
    inside = present[:, None] & (c[None, :] < width)
    some = present[:, None] & (k[None, :] < K)
    by_output = tl.load(grad_products + row[:, None] * K + k[None, :], mask=some, other=0.0)
    # The mean square is over all features.
    by_square = tl.load(grad_squares + row, mask=present, other=0.0) * (2 / (n * width))
    if READ:
        g = tl.load(grad_input + row[:, None] * width + c[None, :], mask=inside, other=0.0).to(tl.float32)
    for j in tl.static_range(n):
        place = row[:, None] * (n * width) + j * width + c[None, :]
        w_inside = (k[:, None] < K) & (c[None, :] < width)
        w = tl.load(weight + k[:, None] * (n * width) + j * width + c[None, :], mask=w_inside, other=0.0)
        value = tl.dot(by_output, w, input_precision=PRECISION)
        value += by_square[:, None] * tl.load(streams + place, mask=inside, other=0.0).to(tl.float32)
        if READ:
            value += tl.load(h_pre + row * n + j, mask=present, other=0.0)[:, None] * g
        if KNOWN:
            value += tl.load(known + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + place, rounded(value, out.dtype.element_ty), mask=inside)


@jit
def _weight_gradient(streams, grad_products, out, rows, features, share, K: tl.constexpr, PADDED: tl.constexpr,
                     TOKENS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.program_id(2) * PADDED + tl.arange(0, PADDED)
    first = tl.program_id(1).to(tl.int64) * share
    total = tl.zeros((PADDED, BLOCK), tl.float32)
    for start in range(0, share, TOKENS):
        row = first + start + tl.arange(0, TOKENS)
        inside = (row[:, None] < rows) & (c[None, :] < features)
        x = tl.load(streams + row[:, None] * features + c[None, :], mask=inside, other=0.0)
        some = (row[None, :] < rows) & (k[:, None] < K)
        rest = tl.load(grad_products + row[None, :] * K + k[:, None], mask=some, other=0.0)
        if streams.dtype.element_ty == tl.bfloat16:
            for _ in tl.static_range(PARTS):
                narrow = rounded(rest, tl.bfloat16)
                total = narrow_dot(narrow, x, total)
                rest -= narrow.to(tl.float32)
        else:
            total = tl.dot(rest, x.to(tl.float32), total, input_precision=PRECISION)
    place = tl.program_id(1).to(tl.int64) * K * features + k[:, None] * features + c[None, :]
    tl.store(out + place, total, mask=(k[:, None] < K) & (c[None, :] < features))


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of products `[T, k]` and mean squares `[T]`, and those of the bias and of alpha by output `[2, k]`.

    What the branch input `[T, C]` says about the read weights is `sum_c grad_input[c] streams[j, c]`.
    """
    tokens, n, width = streams.shape
    outputs = products.shape[1]
    made = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (products, squares)]
    programs = -(-tokens // ROWS)
    sums = products.new_empty(2, programs, outputs)
    inputs = (grad_input, streams, h_pre, h_post, grad_h_post, grad_logits, products, squares, alpha)
    constants = {"n": n, "K": outputs, "PADDED": padded_outputs(outputs), "ROWS": ROWS, "BLOCK": block_size(n)}
    contiguous = (tensor.contiguous() for tensor in inputs)
    run(_gate_gradients, (programs,), *contiguous, *made, *sums, tokens, width, eps, **constants, num_warps=ROWS)
    return made[0], made[1], sums.sum(1)


@gate_gradients.register_fake
def _(grad_input, streams, h_pre, h_post, grad_h_post, grad_logits, products, squares, alpha, eps):
    outputs = products.shape[1]
    return products.new_empty(products.shape), squares.new_empty(squares.shape), products.new_empty(2, outputs)


@torch.library.custom_op("kromhc_hf::streams_gradient", mutates_args=())
def streams_gradient(
    known: Tensor | None,
    grad_input: Tensor | None,
    streams: Tensor,
    h_pre: Tensor | None,
    weight: Tensor,
    grad_products: Tensor,
    grad_squares: Tensor,
) -> Tensor:
    """What projection and norm say about the streams `[T, n, C]`, and what reading says, added to what is known."""
    tokens, n, width = streams.shape
    outputs = len(weight)
    out = torch.empty(streams.shape, dtype=streams.dtype, device=streams.device)
    constants = {"KNOWN": known is not None, "READ": h_pre is not None, "n": n, "K": outputs}
    padded = max(16, 1 << (outputs - 1).bit_length())
    # Rounded to 16 bits in the end, the product needs no more than the 11 bits of TF32.
    narrow = streams.itemsize == 2
    constants |= {"PADDED": padded, "PRECISION": "tf32" if narrow else "tf32x3"}
    # Tensor cores take 16 features at least, and a warp or two are enough for narrow tiles with few outputs.
    together, block = 32 if narrow and padded > 32 else 16, min(128, max(16, 4096 // padded))
    warps = padded // 16 if narrow and padded <= 32 else 4
    constants |= {"TOKENS": together, "BLOCK": block}
    grid = (-(-tokens // together), -(-width // block))
    given = (
        streams if t is None else t for t in (known, grad_input, streams, h_pre, weight, grad_products, grad_squares)
    )
    contiguous = (tensor.contiguous() for tensor in given)
    run(_streams_gradient, grid, *contiguous, out, tokens, width, **constants, num_warps=warps)
    return out


@streams_gradient.register_fake
def _(known, grad_input, streams, *others):
    return streams.new_empty(streams.shape)


@torch.library.custom_op("kromhc_hf::weight_gradient", mutates_args=())
def weight_gradient(rows: Tensor, grad_products: Tensor) -> Tensor:
    """`sum_t grad_products[t] rows[t]`: `[T, F]` and `[T, k]` -> `[k, F]`."""
    (tokens, features), outputs = rows.shape, grad_products.shape[1]
    padded, together = padded_outputs(outputs), 32
    block = 256 if rows.itemsize == 2 and padded <= 32 else 4096 // padded
    share = max(SHARE, together * -(-tokens // (together * SHARES)))
    shares = -(-tokens // share)
    out = rows.new_empty(shares, outputs, features, dtype=torch.float32)
    constants = {"K": outputs, "PADDED": padded, "TOKENS": together, "BLOCK": block}
    grid = (-(-features // constants["BLOCK"]), shares, -(-outputs // padded))
    inputs = (rows.contiguous(), grad_products.contiguous())
    run(_weight_gradient, grid, *inputs, out, tokens, features, share, **constants, num_warps=4, num_stages=4)
    return out.sum(0)


@weight_gradient.register_fake
def _(rows, grad_products):
    return rows.new_empty(grad_products.shape[1], rows.shape[1], dtype=torch.float32)
