# Code of kromhc-hf, which travels with every model that it saves.
"""A gate for every channel of every stream in the read, beside the read weights (Gated Residual of Qwen)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .mixing import cast


def gate_shapes(num_streams: int, hidden_size: int, rank: int) -> dict[str, tuple[int, ...]]:
    """The parameters of the gate by name."""
    return {"read_down": (rank, num_streams * hidden_size), "read_up": (num_streams * hidden_size, rank)}


def initial_gate(shape: tuple[int, ...], seed: int) -> Tensor:
    """Where `read_down` starts: normal, the same in every run, so that its products have variance 1."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")
    return drawn / shape[1] ** 0.5


def gated_part(streams: Tensor, down: Tensor, up: Tensor, eps: float) -> Tensor:
    """What the gates add to the branch input: `1/n sum_i (2 sigmoid(up silu(down v)) - 1)_i * streams[i]`.

    `v` is all streams of a token side by side, each divided by its root mean square. With `up` 0 it is exactly 0. With
    read weights of 1/n the branch input is then `1/n sum_i 2 sigmoid(up silu(down v))_i * streams[i]`, the gated read
    of transformers' qwen4_exp but for the norm, which there stands in front of it and here in the branch.

    Args:
        streams: `[..., n, C]`, in any dtype.
        down: `[rank, n * C]`, in the dtype of the coefficients.
        up: `[n * C, rank]`.
        eps: added to mean squares.

    Returns:
        `[..., C]` in the dtype of the coefficients.
    """
    wide = cast(streams, down.dtype)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    # 2 sigmoid(z) - 1, without the difference.
    gates = torch.tanh(F.linear(F.silu(F.linear(normed.flatten(-2), down)), up) / 2)
    return (gates.unflatten(-1, wide.shape[-2:]) * wide).mean(-2)
