# Code of kromhc-hf, which travels with every model that it saves.
"""Which implementation reads and writes the streams: plain PyTorch, or Triton where it can run."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels_compiled import Project, Read, Write
from .kernels_eager import connect, connect_reference
from .kernels_eager_passes import transformed
from .kernels_triton import read, write
from .kernels_triton_language import AVAILABLE, DTYPES, INTERPRETED, LARGEST_OUTPUTS, LARGEST_STREAMS
from .kernels_triton_projection import project
from .kernels_triton_width import Width
from .mixing import Mixing


KERNELS = ("auto", "torch", "triton", "reference")

# From streams `[..., n, C]`, weight, bias, alpha, the mixing and eps to the branch input `[..., C]` and the depth
# connection, which takes the branch output.
Connect = Callable[
    [Tensor, Tensor | None, Tensor, Tensor | None, Mixing, float], tuple[Tensor, Callable[[Tensor], Tensor]]
]


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
        ValueError: if there is no such kernel, or "triton" was asked for and cannot serve the streams, with the reason.
    """
    check_kernel(kernel)
    if kernel == "reference":
        return connect_reference
    if kernel != "torch":
        reason = _obstacle(streams, dtype, interpreted=kernel == "triton")
        if reason is None:
            return connect_triton
        if kernel == "triton":
            raise ValueError(f"kernel 'triton' {reason}. Use kernel='auto' or kernel='torch'.")
    if transformed():
        return connect_reference
    return partial(connect_passes, passes=COMPOSITE) if torch.compiler.is_compiling() else connect


def _obstacle(streams: Tensor, dtype: torch.dtype, interpreted: bool) -> str | None:
    """Why Triton cannot serve these streams."""
    if not AVAILABLE:
        return "needs the package triton, which is not installed"
    if streams.dtype not in DTYPES or dtype != torch.float32:
        return f"takes streams in float32, bfloat16 or float16 with fp32 coefficients; got {streams.dtype} and {dtype}"
    if streams.device.type != "cuda" and not (interpreted and INTERPRETED):
        return f"needs a CUDA device, or TRITON_INTERPRET=1 in the environment; got streams on {streams.device}"
    if streams.shape[-2] > LARGEST_STREAMS:
        return f"takes at most {LARGEST_STREAMS} streams; got {streams.shape[-2]}"
    if transformed():
        return "has no forward-mode derivatives and no rules for transforms of torch.func"
    return None


def connect_passes(
    streams: Tensor,
    weight: Tensor | None,
    bias: Tensor,
    alpha: Tensor | None,
    mixing: Mixing,
    eps: float,
    passes: Passes,
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The branch input `[..., C]` of streams `[..., n, C]`, and the depth connection, which takes the branch output."""
    tokens = streams.flatten(0, -3)
    products, squares = (None, None) if weight is None else passes.project(tokens, weight)
    h_pre, h_post, h_res = mixing.mappings(products, squares, bias, alpha, eps, tokens.shape[:1])
    branch_input = passes.read(tokens, h_pre)

    def write_back(branch_output: Tensor) -> Tensor:
        output = branch_output.flatten(0, -2)
        return passes.write(tokens, h_res, h_post, output, mixing.rows_sum_to_one).view(streams.shape)

    return branch_input.view(*streams.shape[:-2], -1), write_back


def fuses(weight: Tensor | None, mixing: Mixing) -> bool:
    """Whether the Triton kernel of the projection makes the gates as well."""
    return weight is not None and mixing.plain_gates and weight.shape[0] <= LARGEST_OUTPUTS


def connect_triton(
    streams: Tensor, weight: Tensor | None, bias: Tensor, alpha: Tensor | None, mixing: Mixing, eps: float
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The same in Triton, with the gates in the kernel of the projection where they are sigmoids of it."""
    if not fuses(weight, mixing):
        return connect_passes(streams, weight, bias, alpha, mixing, eps, TRITON)
    tokens, branch_input, h_post, logits = Width.apply(streams.flatten(0, -3), weight, bias, alpha, eps)
    h_res = mixing.matrix(logits)

    def write_back(branch_output: Tensor) -> Tensor:
        output = branch_output.flatten(0, -2)
        return write(tokens, h_res, h_post, output, mixing.rows_sum_to_one).view(streams.shape)

    return branch_input.view(*streams.shape[:-2], -1), write_back
