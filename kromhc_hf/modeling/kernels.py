# Code of kromhc-hf, which travels with every model that it saves.
"""Which implementation reads and writes the streams: plain PyTorch, or Triton where it can run."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels_compiled import Project, Read, Write
from .kernels_eager import connect, connect_reference
from .kernels_eager_passes import transformed
from .kernels_triton import project, read, write
from .kernels_triton_fused import LARGEST_OUTPUTS, LARGEST_STREAMS, width, write_width
from .kernels_triton_language import AVAILABLE, DTYPES, INTERPRETED
from .mixing import Mixing


KERNELS = ("auto", "torch", "triton", "reference")

# From streams `[..., n, C]`, weight, bias, alpha, the mixing and eps to the branch input `[..., C]` and the depth
# connection, which takes the branch output.
Connect = Callable[
    [Tensor, Tensor | None, Tensor, Tensor | None, Mixing, float], tuple[Tensor, Callable[[Tensor], Tensor]]
]


@dataclass(frozen=True)
class TritonWrite:
    """A depth connection in Triton, called with the branch output `[..., C]`."""

    tokens: Tensor  # [T, n, C]
    h_res: Tensor
    h_post: Tensor
    rows_sum_to_one: bool
    shape: torch.Size  # of the streams

    def __call__(self, branch_output: Tensor) -> Tensor:
        output = branch_output.flatten(0, -2)
        return write(self.tokens, self.h_res, self.h_post, output, self.rows_sum_to_one).view(self.shape)


class UnwrittenStreams(NamedTuple):
    """Streams that the next hyper-connection writes, in the kernel that reads them."""

    write: TritonWrite
    branch_output: Tensor  # [..., C]


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
    """Whether one Triton kernel makes the whole width connection."""
    if weight is None or not mixing.plain_gates:
        return False
    return mixing.num_streams <= LARGEST_STREAMS and weight.shape[0] <= LARGEST_OUTPUTS


def connect_triton(
    streams: Tensor, weight: Tensor | None, bias: Tensor, alpha: Tensor | None, mixing: Mixing, eps: float
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The same in Triton, and in one kernel where the gates are sigmoids of one projection."""
    if weight is None or alpha is None or not fuses(weight, mixing):
        return connect_passes(streams, weight, bias, alpha, mixing, eps, TRITON)
    tokens = streams.flatten(0, -3)
    branch_input, _, h_post, logits, *_ = width(tokens, weight, bias, alpha, eps)
    return branch_input.view(*streams.shape[:-2], -1), _write(tokens, h_post, logits, mixing, streams.shape)


def connect_unwritten(
    streams: UnwrittenStreams, weight: Tensor, bias: Tensor, alpha: Tensor, mixing: Mixing, eps: float
) -> tuple[Tensor, TritonWrite]:
    """Writes the streams and connects them, in one kernel."""
    old, branch_output = streams
    output = branch_output.flatten(0, -2)
    tokens, branch_input, _, h_post, logits, *_ = write_width(
        old.tokens, old.h_res, old.h_post, output, old.rows_sum_to_one, weight, bias, alpha, eps
    )
    return branch_input.view(branch_output.shape), _write(tokens, h_post, logits, mixing, old.shape)


def _write(tokens: Tensor, h_post: Tensor, logits: Tensor, mixing: Mixing, shape: torch.Size) -> TritonWrite:
    h_res = mixing.matrix(logits)
    return TritonWrite(tokens, h_res, h_post, mixing.rows_sum_to_one, shape)
