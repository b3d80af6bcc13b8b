"""Which implementation reads and writes the streams: plain PyTorch, or Triton where it can run."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .composite_kernels import Project, Read, Write
from .plain_kernels import Mapper, connect
from .triton_kernels import AVAILABLE, DTYPES, INTERPRETED, project, read, write


KERNELS = ("auto", "torch", "triton")

# From streams `[..., n, C]`, weight, bias, alpha and what maps them to the branch input `[..., C]` and the depth
# connection, which takes the branch output.
Connect = Callable[[Tensor, Tensor | None, Tensor, Tensor | None, Mapper], tuple[Tensor, Callable[[Tensor], Tensor]]]


class Passes(NamedTuple):
    """The passes over the streams, each with a gradient of its own, between which autograd does the rest."""

    project: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    read: Callable[[Tensor, Tensor], Tensor]
    write: Callable[[Tensor, Tensor, Tensor, Tensor, bool], Tensor]


COMPOSITE = Passes(Project.apply, Read.apply, Write.apply)
TRITON = Passes(project, read, write)


def check_kernel(kernel: str) -> None:
    """Refuses an unknown kernel.

    Raises:
        ValueError: with the names that are known.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}; got {kernel!r}.")


def select_connect(kernel: str, streams: Tensor, dtype: torch.dtype) -> Connect:
    """What connects these streams, with coefficients in `dtype`; "auto" takes Triton on a CUDA device.

    Raises:
        ValueError: if "triton" was asked for and cannot serve the streams, with the reason.
    """
    if kernel != "torch":
        reason = _obstacle(streams, dtype, interpreted=kernel == "triton")
        if reason is None:
            return partial(connect_passes, TRITON)
        if kernel == "triton":
            raise ValueError(f"kernel 'triton' {reason}. Use kernel='auto' or kernel='torch'.")
    return partial(connect_passes, COMPOSITE) if torch.compiler.is_compiling() else connect


def _obstacle(streams: Tensor, dtype: torch.dtype, interpreted: bool) -> str | None:
    """Why Triton cannot serve these streams."""
    if not AVAILABLE:
        return "needs the package triton, which is not installed"
    if streams.dtype not in DTYPES or dtype != torch.float32:
        return f"takes streams in float32, bfloat16 or float16 with fp32 coefficients; got {streams.dtype} and {dtype}"
    if streams.device.type != "cuda" and not (interpreted and INTERPRETED):
        return f"needs a CUDA device, or TRITON_INTERPRET=1 in the environment; got streams on {streams.device}"
    return None


def connect_passes(
    passes: Passes, streams: Tensor, weight: Tensor | None, bias: Tensor, alpha: Tensor | None, mapper: Mapper
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The branch input `[..., C]` of streams `[..., n, C]`, and the depth connection, which takes the branch output."""
    tokens = streams.flatten(0, -3)
    products, squares = (None, None) if weight is None else passes.project(tokens, weight)
    h_pre, h_post, h_res = mapper.coefficients(products, squares, bias, alpha, tokens.shape[0])
    branch_input = passes.read(tokens, h_pre)

    def write_back(branch_output: Tensor) -> Tensor:
        output = branch_output.flatten(0, -2)
        return passes.write(tokens, h_res, h_post, output, mapper.mixing.rows_sum_to_one).view(streams.shape)

    return branch_input.view(*streams.shape[:-2], -1), write_back
