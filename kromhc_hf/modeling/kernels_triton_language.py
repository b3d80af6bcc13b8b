# Code of kromhc-hf, which travels with every model that it saves.
"""What the Triton kernels share: whether Triton is there, rounding, and the tiles of a block of tokens.

All files of kernels begin as this one: mypy does not check them, since the language of kernels is not Python and its
types are not types; and annotations stay text, which Triton reads, and without Triton nothing could evaluate them.
"""

# mypy: ignore-errors

from __future__ import annotations

import os
from contextlib import nullcontext
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
# Tokens of a program without a matrix product, one per warp.
ROWS = 4
# A wider weight is projected by several programs, and leaves the gates to others.
LARGEST_OUTPUTS = 64
# Three products of what TF32 has of both factors and of the rest, which miss fp32 by its last bits.
PRECISION = AVAILABLE and tl.constexpr("tf32x3")
# Numbers in bf16 whose sum stands for a coefficient beside streams in bf16.
PARTS = AVAILABLE and tl.constexpr(2)
# More streams would not stay in registers: every pass holds a tile of each.
LARGEST_STREAMS = 8
SNAP_DISTANCE = AVAILABLE and tl.constexpr(snap_distance(torch.float32))


def jit(function):
    return triton.jit(function) if AVAILABLE else function


def block_size(num_streams: int) -> int:
    """How many features of all streams a program holds at once: 16 bytes of each in every thread, and fewer of many."""
    return 256 if num_streams <= 4 else 128


def padded_outputs(outputs: int) -> int:
    """The outputs of one program, filled up to what tensor cores take."""
    return min(LARGEST_OUTPUTS, max(16, 1 << (outputs - 1).bit_length()))


def run(kernel, grid, *arguments, **constants):
    """Runs a kernel on the device of its first argument, which need not be the current one."""
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **constants)


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
def load_streams(streams, place, inside, width, n: tl.constexpr):
    """The tiles `[ROWS, BLOCK]` of all streams in fp32, 0 outside; `place` is that of the first stream."""
    tiles = ()
    for j in tl.static_range(n):
        tile = tl.load(streams + place + j * width, mask=inside, other=0.0).to(tl.float32)
        tiles = tiles + (tile,)
    return tiles


@jit
def load_numbers(source, row, present, count: tl.constexpr):
    """`count` numbers of each row, `[ROWS]` each, 0 for absent rows."""
    numbers = ()
    for k in tl.static_range(count):
        number = tl.load(source + row * count + k, mask=present, other=0.0)
        numbers = numbers + (number,)
    return numbers


@jit
def weighted(tiles, weights, total, n: tl.constexpr):
    """The sum of tiles times weights, which sum to `total`; relative to the first, so equal ones are not rounded."""
    value = total[:, None] * tiles[0]
    for j in tl.static_range(1, n):
        value += weights[j][:, None] * (tiles[j] - tiles[0])
    return value


@jit
def sum_of(weights, n: tl.constexpr):
    total = weights[0]
    for j in tl.static_range(1, n):
        total += weights[j]
    return snapped(total)


@jit
def written(tiles, y, h_res, h_post, row, present, i: tl.constexpr, SUM_TO_ONE: tl.constexpr, n: tl.constexpr):
    """Stream i of the new streams in fp32, `[ROWS, BLOCK]`, from the tiles of all streams and of the branch output."""
    weights = ()
    for j in tl.static_range(n):
        weights = weights + (tl.load(h_res + row * (n * n) + i * n + j, mask=present, other=0.0),)
    total = sum_of(weights, n)
    if SUM_TO_ONE:
        total = tl.full(total.shape, 1.0, tl.float32)
    post = tl.load(h_post + row * n + i, mask=present, other=0.0)
    return weighted(tiles, weights, total, n) + post[:, None] * y


@jit
def zeros(count: tl.constexpr, ROWS: tl.constexpr):
    numbers = ()
    for _ in tl.static_range(count):
        numbers = numbers + (tl.zeros((ROWS,), tl.float32),)
    return numbers


@jit
def plus_products(sums, tiles, tile, n: tl.constexpr):
    """`sums` and the sums over the features of each of the tiles times one other, `[ROWS]` each."""
    more = ()
    for j in tl.static_range(n):
        more = more + (sums[j] + tl.sum(tiles[j] * tile, axis=1),)
    return more


@jit
def write_gradients(grads, streams, matrix, post, branch_output, grad_streams, grad_output, matrix_sums, post_sums, row,
                    c, inside, width, n: tl.constexpr):  # fmt: skip
    """Stores the gradients of streams and branch output of a block, and adds to those of `h_res` and `h_post`."""
    of_one, place = row[:, None] * width + c[None, :], row[:, None] * (n * width) + c[None, :]
    y = tl.load(branch_output + of_one, mask=inside, other=0.0).to(tl.float32)
    value = post[0][:, None] * grads[0]
    for i in tl.static_range(1, n):
        value += post[i][:, None] * grads[i]
    tl.store(grad_output + of_one, rounded(value, grad_output.dtype.element_ty), mask=inside)
    for j in tl.static_range(n):
        mixed = matrix[j][:, None] * grads[0]
        for i in tl.static_range(1, n):
            mixed += matrix[i * n + j][:, None] * grads[i]
        tl.store(grad_streams + place + j * width, rounded(mixed, grad_streams.dtype.element_ty), mask=inside)
    tiles = load_streams(streams, place, inside, width, n)
    more = ()
    for i in tl.static_range(n):
        for j in tl.static_range(n):
            more = more + (matrix_sums[i * n + j] + tl.sum(grads[i] * tiles[j], axis=1),)
    return more, plus_products(post_sums, grads, y, n)


@jit
def store_numbers(target, numbers, row, present, count: tl.constexpr):
    for k in tl.static_range(count):
        tl.store(target + row * count + k, numbers[k], mask=present)


@jit
def narrow_dot(left, right, total):
    """A product of tiles in bf16, added to a total in fp32."""
    if ROUNDS_BY_ITSELF:
        return tl.dot(left, right, total)
    # The interpreter takes bf16 for whole numbers.
    return tl.dot(left.to(tl.float32), right.to(tl.float32), total)
