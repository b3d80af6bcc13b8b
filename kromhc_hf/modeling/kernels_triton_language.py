# Code of kromhc-hf, which travels with every model that it saves.
"""What the Triton kernels share: whether Triton is there, rounding, the gates and the read of a block of tokens.

All files of kernels begin as this one: mypy does not check them, since the language of kernels is not Python and its
types are not types; and annotations stay text, which Triton reads, and without Triton nothing could evaluate them.
"""

# mypy: ignore-errors

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import wraps
from importlib import import_module
from importlib.util import find_spec

import torch

from .mixing import snap_distance


# Not an import statement: this file travels to the Hub, and Triton is not needed to use it.
AVAILABLE = find_spec("triton") is not None
triton, tl = (import_module(name) if AVAILABLE else None for name in ("triton", "triton.language"))

# Triton decides when a kernel is defined.
INTERPRETED = AVAILABLE and os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")
ROUNDS_BY_ITSELF = AVAILABLE and tl.constexpr(not INTERPRETED)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Tokens of a program with a matrix product, whose sides are at least 16.
TOKENS = 16
# TF32 would round the streams to 11 bits.
PRECISION = AVAILABLE and tl.constexpr("ieee")
SNAP_DISTANCE = AVAILABLE and tl.constexpr(snap_distance(torch.float32))


def jit(function):
    return triton.jit(function) if AVAILABLE else function


def run(kernel, grid, *arguments, **constants):
    """Runs a kernel on the device of its first argument, which need not be the current one."""
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **constants)


def first_derivatives(gradients):
    """Refuses to be differentiated again: what the fused kernels save of the gates would count as a constant."""

    @wraps(gradients)
    def checked(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "kernel 'triton' has first derivatives only; got a backward pass with create_graph=True. Set "
                "kernel='torch' or kernel='reference' on every HyperConnection of the model."
            )
        return gradients(ctx, *grads)

    return checked


@jit
def rounded(value, dtype: tl.constexpr):
    if dtype == tl.bfloat16 and not ROUNDS_BY_ITSELF:
        # The interpreter cuts the rest off instead of rounding to the nearest even, and fails below the normal range.
        bits = value.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.int16).to(dtype, bitcast=True)
    return value.to(dtype)


@jit
def snapped(total):
    return tl.where(tl.abs(total - 1.0) <= SNAP_DISTANCE, 1.0, total)


@jit
def project_tile(tile, weight, stream, c, n, width, K: tl.constexpr, N: tl.constexpr, PADDED: tl.constexpr,
                  TOKENS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Products `[TOKENS, PADDED]` and sums of squares of a tile `[TOKENS, N, BLOCK]` in fp32, 0 outside."""
    output = tl.arange(0, PADDED)
    inside = (output[:, None, None] < K) & (stream[None, :, None] < n) & (c[None, None, :] < width)
    place = output[:, None, None] * (n * width) + stream[None, :, None] * width + c[None, None, :]
    w = tl.reshape(tl.load(weight + place, mask=inside, other=0.0), (PADDED, N * BLOCK))
    x = tl.reshape(tile, (TOKENS, N * BLOCK))
    return tl.dot(x, tl.trans(w), input_precision=PRECISION), tl.sum(x * x, axis=1)


@jit
def store_gates(products_sum, square_sum, bias, alpha, h_pre, h_post, logits, products, squares, row, rows, n, width,
                eps, K: tl.constexpr, PADDED: tl.constexpr):  # fmt: skip
    """Stores what the mappings of a block of tokens are, and what their gradient needs."""
    k = tl.arange(0, PADDED)
    mean = square_sum / (n * width)
    tl.store(squares + row, mean, mask=row < rows)
    inside = (row[:, None] < rows) & (k[None, :] < K)
    tl.store(products + row[:, None] * K + k[None, :], products_sum, mask=inside)
    scale = tl.where(k < n, tl.load(alpha), tl.where(k < 2 * n, tl.load(alpha + 1), tl.load(alpha + 2)))
    static = tl.load(bias + k, mask=k < K, other=0.0)
    logit = static[None, :] + scale[None, :] * (products_sum * tl.rsqrt(mean + eps)[:, None])
    # Divided to the last bit: the read weights of a new hyper-connection must sum to 1 within 4 eps.
    gate = tl.math.div_rn(tl.full(logit.shape, 1.0, tl.float32), 1.0 + tl.exp(-logit))
    pre = h_pre + row[:, None] * n + k[None, :]
    tl.store(pre, gate, mask=inside & (k[None, :] < n))
    post = h_post + row[:, None] * n + (k[None, :] - n)
    tl.store(post, 2.0 * gate, mask=inside & (k[None, :] >= n) & (k[None, :] < 2 * n))
    residual = logits + row[:, None] * (K - 2 * n) + (k[None, :] - 2 * n)
    tl.store(residual, logit, mask=inside & (k[None, :] >= 2 * n))


@jit
def read_rows(streams, h_pre, out, row, rows, width, n: tl.constexpr, BLOCK: tl.constexpr):
    """Reads the streams of a block of tokens, from the end, which the cache still has."""
    # What other threads of this program have stored.
    tl.debug_barrier()
    present = row < rows
    total = tl.load(h_pre + row * n, mask=present, other=0.0)
    for j in tl.static_range(1, n):
        total += tl.load(h_pre + row * n + j, mask=present, other=0.0)
    total = snapped(total)
    blocks = tl.cdiv(width, BLOCK)
    for block in range(0, blocks):
        c = (blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
        inside = present[:, None] & (c[None, :] < width)
        place = row[:, None] * (n * width) + c[None, :]
        first = tl.load(streams + place, mask=inside, other=0.0).to(tl.float32)
        value = total[:, None] * first
        for j in tl.static_range(1, n):
            x = tl.load(streams + place + j * width, mask=inside, other=0.0).to(tl.float32)
            weights = tl.load(h_pre + row * n + j, mask=present, other=0.0)
            value += weights[:, None] * (x - first)
        tl.store(out + row[:, None] * width + c[None, :], rounded(value, out.dtype.element_ty), mask=inside)
