# Code of kromhc-hf, which travels with every model that it saves.
"""Which implementation reads and writes the streams: plain PyTorch, or Triton where it runs and agrees with it."""

from functools import partial

import torch
from torch import Tensor

from .kernels_check import fault, found_at_fault
from .kernels_connect import COMPOSITE, Connect, connect_passes, connect_triton
from .kernels_eager import connect, connect_reference
from .kernels_triton_language import AVAILABLE, DTYPES, INTERPRETED, LARGEST_STREAMS
from .known_values import transformed


KERNELS = ("auto", "torch", "triton", "reference")

# Where "auto" looks for Triton.
DEVICES = ("cuda",)


def check_kernel(kernel: str) -> None:
    """Refuses an unknown kernel.

    Raises:
        ValueError: with the names that are known.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}; got {kernel!r}.")


def select_connect(
    kernel: str, streams: Tensor, dtype: torch.dtype, num_streams: int, hidden_size: int, variant: str
) -> Connect:
    """What connects these streams `[..., n, C]`, with coefficients in `dtype`; a traced shape would not give n and C.

    "auto" takes Triton on a CUDA device, once it has agreed there with plain PyTorch (see `kernels_check`).

    Raises:
        ValueError: if there is no such kernel, or "triton" was asked for and cannot serve the streams, with the reason.
    """
    if kernel == "auto":
        if streams.device.type in DEVICES:
            if _obstacle(streams.device, streams.dtype, num_streams, dtype) is None:
                if fault(streams.device, streams.dtype, num_streams, hidden_size, variant) is None:
                    return connect_triton
    elif kernel == "triton":
        if (reason := _obstacle(streams.device, streams.dtype, num_streams, dtype)) is not None:
            raise ValueError(f"kernel 'triton' {reason}. Use kernel='auto' or kernel='torch'.")
        return connect_triton
    elif kernel == "reference":
        return connect_reference
    else:
        check_kernel(kernel)
    if transformed():
        return connect_reference
    return partial(connect_passes, passes=COMPOSITE) if torch.compiler.is_compiling() else connect


def described(kernel: str, device: torch.device, num_streams: int, variant: str) -> str:
    """What a kernel is on this device, for streams in bf16, as far as it is known before they are there."""
    if kernel != "auto":
        return repr(kernel)
    served = device.type in DEVICES and _obstacle(device, torch.bfloat16, num_streams, torch.float32) is None
    return f"'auto' ({'triton' if served and not found_at_fault(device, num_streams, variant) else 'torch'})"


def chosen(
    device: torch.device, dtype: torch.dtype, num_streams: int, hidden_size: int, variant: str
) -> tuple[str, str]:
    """What "auto" takes for such streams, "triton" or "torch", and why; on a CUDA device Triton is tried for that."""
    if device.type not in DEVICES:
        return "torch", f"Triton is for {', '.join(DEVICES)} devices"
    reason = _obstacle(device, dtype, num_streams, torch.float32)
    if reason is not None:
        return "torch", f"Triton {reason}"
    found = fault(device, dtype, num_streams, hidden_size, variant)
    if found is not None:
        return "torch", f"a check of the Triton kernels failed: {found}"
    return "triton", "it agreed with plain PyTorch in a check"


def _obstacle(device: torch.device, dtype: torch.dtype, num_streams: int, coefficients: torch.dtype) -> str | None:
    """Why Triton cannot serve streams of this dtype."""
    if not AVAILABLE:
        return "needs the package triton, which is not installed"
    if dtype not in DTYPES or coefficients != torch.float32:
        return f"takes streams in float32, bfloat16 or float16 with fp32 coefficients; got {dtype} and {coefficients}"
    if device.type != "cuda" and not INTERPRETED:
        return f"needs a CUDA device, or TRITON_INTERPRET=1 in the environment; got streams on {device}"
    if num_streams > LARGEST_STREAMS:
        return f"takes at most {LARGEST_STREAMS} streams; got {num_streams}"
    if transformed():
        return "has no forward-mode derivatives and no rules for transforms of torch.func"
    return None
