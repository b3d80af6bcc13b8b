"""Which implementation reads and writes the streams: plain PyTorch, or Triton where it can run."""

from collections.abc import Callable

import torch
from torch import Tensor

from .plain_kernels import Coefficients
from .triton_kernels import AVAILABLE, DTYPES, INTERPRETED, project, read, write


KERNELS = ("auto", "torch", "triton")


def check_kernel(kernel: str) -> None:
    """Refuses an unknown kernel.

    Raises:
        ValueError: with the names that are known.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}; got {kernel!r}.")


def select_kernel(kernel: str, streams: Tensor, dtype: torch.dtype) -> str:
    """ "torch" or "triton" for these streams, with coefficients in `dtype`; "auto" takes Triton on a CUDA device.

    Raises:
        ValueError: if "triton" was asked for and cannot serve the streams, with the reason.
    """
    if kernel == "torch":
        return kernel
    reason = _obstacle(streams, dtype, interpreted=kernel == "triton")
    if reason is None:
        return "triton"
    if kernel == "triton":
        raise ValueError(f"kernel 'triton' {reason}. Use kernel='auto' or kernel='torch'.")
    return "torch"


def _obstacle(streams: Tensor, dtype: torch.dtype, interpreted: bool) -> str | None:
    """Why Triton cannot serve these streams."""
    if not AVAILABLE:
        return "needs the package triton, which is not installed"
    if streams.dtype not in DTYPES or dtype != torch.float32:
        return f"takes streams in float32, bfloat16 or float16 with fp32 coefficients; got {streams.dtype} and {dtype}"
    if streams.device.type != "cuda" and not (interpreted and INTERPRETED):
        return f"needs a CUDA device, or TRITON_INTERPRET=1 in the environment; got streams on {streams.device}"
    return None


def connect_triton(
    streams: Tensor,
    weight: Tensor | None,
    bias: Tensor,
    alpha: Tensor | None,
    coefficients: Coefficients,
    rows_sum_to_one: bool,
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Like `plain_kernels.connect`, with the passes over the streams in Triton."""
    tokens = streams.flatten(0, -3)
    products, squares = None, None
    if weight is not None:
        products, squares = project(tokens, weight, tokens.shape[1] * tokens.shape[2] // weight.shape[1])
    h_pre, h_post, h_res = coefficients(products, squares, bias, alpha, tokens.shape[0])
    branch_input = read(tokens, h_pre)

    def write_back(branch_output: Tensor) -> Tensor:
        output = branch_output.flatten(0, -2)
        return write(tokens, h_res, h_post, output, rows_sum_to_one).view(streams.shape)

    return branch_input.view(*streams.shape[:-2], -1), write_back
