# Code of kromhc-hf, which travels with every model that it saves.
"""The thin product of the streams with the weight of the mappings in Triton, and its gates.

Tensor cores multiply numbers of fewer bits than fp32 has. In bf16 the streams are such numbers as they are, and the
weight is the sum of two, which have 16 bits together; other streams are split as well. The product moves `n C` elements
per token.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
from torch import Tensor

from .kernels_triton_gradients import streams_gradient, weight_gradient
from .kernels_triton_language import PARTS, PRECISION, jit, narrow_dot, padded_outputs, rounded, run, tl


@jit
def thin_product(streams, weight, row, rows, output, features, K: tl.constexpr, PADDED: tl.constexpr,
                 TOKENS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Products `[TOKENS, PADDED]` and mean squares `[TOKENS]` of rows of features, 0 outside."""
    products = tl.zeros((TOKENS, PADDED), tl.float32)
    squares = tl.zeros((TOKENS,), tl.float32)
    for start in range(0, features, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = (row[:, None] < rows) & (c[None, :] < features)
        x = tl.load(streams + row[:, None] * features + c[None, :], mask=inside, other=0.0)
        w_inside = (output[None, :] < K) & (c[:, None] < features)
        place = output[None, :] * features + c[:, None]
        if weight.dtype.element_ty == tl.bfloat16:
            for part in tl.static_range(PARTS):
                w = tl.load(weight + part * K * features + place, mask=w_inside, other=0.0)
                products = narrow_dot(x, w, products)
        else:
            w = tl.load(weight + place, mask=w_inside, other=0.0)
            products = tl.dot(x.to(tl.float32), w, products, input_precision=PRECISION)
        wide = x.to(tl.float32)
        squares += tl.sum(wide * wide, axis=1)
    return products, squares / features


@jit
def _project(streams, weight, products, squares, rows, features, K: tl.constexpr, PADDED: tl.constexpr,
             TOKENS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    output = tl.program_id(1) * PADDED + tl.arange(0, PADDED)
    product, mean = thin_product(streams, weight, row, rows, output, features, K, PADDED, TOKENS, BLOCK)
    inside = (row[:, None] < rows) & (output[None, :] < K)
    tl.store(products + row[:, None] * K + output[None, :], product, mask=inside)
    tl.store(squares + row, mean, mask=row < rows)


@jit
def _gates(streams, weight, bias, alpha, h_pre, h_post, logits, products, squares, rows, features, eps, n: tl.constexpr,
           K: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    k = tl.arange(0, PADDED)
    product, mean = thin_product(streams, weight, row, rows, k, features, K, PADDED, TOKENS, BLOCK)
    tl.store(squares + row, mean, mask=row < rows)
    inside = (row[:, None] < rows) & (k[None, :] < K)
    tl.store(products + row[:, None] * K + k[None, :], product, mask=inside)
    scale = tl.where(k < n, tl.load(alpha), tl.where(k < 2 * n, tl.load(alpha + 1), tl.load(alpha + 2)))
    static = tl.load(bias + k, mask=k < K, other=0.0)
    logit = static[None, :] + scale[None, :] * (product * tl.rsqrt(mean + eps)[:, None])
    # Divided to the last bit: the read weights of a new hyper-connection must sum to 1 within 4 eps.
    gate = tl.math.div_rn(tl.full(logit.shape, 1.0, tl.float32), 1.0 + tl.exp(-logit))
    pre = h_pre + row[:, None] * n + k[None, :]
    tl.store(pre, gate, mask=inside & (k[None, :] < n))
    post = h_post + row[:, None] * n + (k[None, :] - n)
    tl.store(post, 2.0 * gate, mask=inside & (k[None, :] >= n) & (k[None, :] < 2 * n))
    residual = logits + row[:, None] * (K - 2 * n) + (k[None, :] - 2 * n)
    tl.store(residual, logit, mask=inside & (k[None, :] >= 2 * n))


@jit
def _split(weight, parts, count, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rest = tl.load(weight + place, mask=place < count, other=0.0)
    for part in tl.static_range(PARTS):
        narrow = rounded(rest, tl.bfloat16)
        tl.store(parts + part * count + place, narrow, mask=place < count)
        rest -= narrow.to(tl.float32)


def _thin(rows: int, outputs: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and constants of the thin product: few rows are shared out, many share the weight."""
    tokens, padded = 64 if rows >= 4096 else 16, padded_outputs(outputs)
    constants = {"K": outputs, "PADDED": padded, "TOKENS": tokens, "BLOCK": 128 if padded <= 32 else 64}
    return (-(-rows // tokens), -(-outputs // padded)), constants | {"num_warps": 4, "num_stages": 3}


def _factor(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight as the thin product takes it: for streams in bf16 two parts `[2, k, F]`, which sum to it."""
    weight = weight.contiguous()
    if dtype != torch.bfloat16:
        return weight
    parts = torch.empty(PARTS.value, *weight.shape, dtype=dtype, device=weight.device)
    run(_split, (-(-weight.numel() // 1024),), weight, parts, weight.numel(), 1024)
    return parts


@torch.library.custom_op("kromhc_hf::project", mutates_args=())
def project(streams: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Products `[T, G, k]` and mean squares `[T, G]` of streams `[T, n, C]` and weight `[k, n * C / G]`."""
    outputs, features = weight.shape
    groups = streams.shape[1] * streams.shape[2] // features
    rows = len(streams) * groups
    products = streams.new_empty(len(streams), groups, outputs, dtype=torch.float32)
    squares = streams.new_empty(products.shape[:2], dtype=torch.float32)
    grid, constants = _thin(rows, outputs)
    inputs = (streams.contiguous(), _factor(weight, streams.dtype))
    run(_project, grid, *inputs, products, squares, rows, features, **constants)
    return products, squares


@project.register_fake
def _(streams, weight):
    groups = streams.shape[1] * streams.shape[2] // weight.shape[1]
    products = streams.new_empty(streams.shape[0], groups, weight.shape[0], dtype=torch.float32)
    return products, streams.new_empty(streams.shape[0], groups, dtype=torch.float32)


def _gate_outputs(streams: Tensor, outputs: int) -> tuple[Tensor, ...]:
    tokens, n, _ = streams.shape
    sizes = ((tokens, n), (tokens, n), (tokens, outputs - 2 * n), (tokens, outputs), (tokens,))
    return tuple(streams.new_empty(size, dtype=torch.float32) for size in sizes)


@torch.library.custom_op("kromhc_hf::gates", mutates_args=())
def gates(
    streams: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gates of streams `[T, n, C]` with weight `[k, n C]`, bias `[k]` and alpha `[3]`.

    Returns:
        h_pre and h_post `[T, n]`, the residual logits `[T, k - 2n]`; products `[T, k]` and mean squares `[T]`.
    """
    made = _gate_outputs(streams, len(weight))
    (programs, _), constants = _thin(len(streams), len(weight))
    inputs = (streams.contiguous(), _factor(weight, streams.dtype), bias.contiguous(), alpha.contiguous())
    sizes = (len(streams), weight.shape[1], eps)
    run(_gates, (programs,), *inputs, *made, *sizes, n=streams.shape[1], **constants)
    return made


@gates.register_fake
def _(streams, weight, *others):
    return _gate_outputs(streams, weight.shape[0])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _project_gradients(ctx, grad_products, grad_squares):
    streams, weight = ctx.saved_tensors
    rows = streams.reshape(-1, weight.shape[1])
    by_row = grad_products.flatten(0, 1)
    if torch.is_grad_enabled():
        # Somebody differentiates again: the same in operations that autograd knows.
        by_square = grad_squares.reshape(-1, 1) * (2 / weight.shape[1])
        grad = (by_row @ weight + by_square * rows).to(streams.dtype)
        return grad.view(streams.shape), by_row.t() @ rows.float()
    grad = streams_gradient(None, None, rows.unsqueeze(1), None, weight, by_row, grad_squares.flatten())
    return grad.view(streams.shape), weight_gradient(rows, by_row)


project.register_autograd(_project_gradients, setup_context=_save)
