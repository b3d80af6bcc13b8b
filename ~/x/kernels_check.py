# Code of kromhc-hf, which travels with every model that it saves.
"""Whether the Triton kernels compute what plain PyTorch does, tried on the device before they are used there.

Once per process, device, dtype, number of streams, variant and class of widths, a small random hyper-connection is run
forward and backward both ways: variants have weights of different sizes, for which kernels are compiled by themselves.
If a compiler fails or a result is wrong, plain PyTorch is left in charge, with a warning.
"""

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from .kernels_connect import TRITON, connect_passes, connect_triton
from .kernels_eager import connect
from .mixing import Mixing
from .variants import make_mixing


# Of the check: kernels take few tokens and many in programs of different sizes.
TOKENS = (80, 4160)
# Triton compiles for widths that are multiples of 16, and for others; neither fills the last program.
WIDTHS = {True: 272, False: 250}
EPS = 1e-6

_faults: dict[tuple[torch.device, torch.dtype, int, bool, str], str | None] = {}


def found_at_fault(device: torch.device, num_streams: int, variant: str) -> bool:
    """Whether a check of so many streams on this device has failed."""
    wanted = (device, num_streams, variant)
    return any(fault for (where, _, n, _, name), fault in _faults.items() if (where, n, name) == wanted)


@torch.compiler.assume_constant_result
def fault(device: torch.device, dtype: torch.dtype, num_streams: int, hidden_size: int, variant: str) -> str | None:
    """What is wrong with the Triton kernels for such streams; None if nothing is. The first answer is kept.

    Where nothing can be run, in the middle of recording a CUDA graph, they are taken to be wrong for now.
    """
    kind = (device, dtype, num_streams, hidden_size % 16 == 0, variant)
    if kind not in _faults:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "was not checked before a CUDA graph was recorded"
        try:
            # A thread of its own has none of the modes that the caller is in: a checkpoint, whose hooks would take what
            # is saved here for its own, inference, autocast, or a mode that counts operations.
            with ThreadPoolExecutor(1) as thread:
                _faults[kind] = thread.submit(_difference, *kind).result()
        except Exception as error:  # whatever a compiler may raise
            _faults[kind] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if _faults[kind] is not None:
            warnings.warn(
                f"The Triton kernels for {num_streams} streams of variant {variant!r} in {dtype} on {device} are not "
                f"used, since a check of them failed: {_faults[kind]}. Plain PyTorch is used instead, which is slower.",
                RuntimeWarning,
                stacklevel=2,
            )
    return _faults[kind]


def _difference(device: torch.device, dtype: torch.dtype, num_streams: int, aligned: bool, variant: str) -> str | None:
    """Which result of the Triton kernels is further from the exact one than rounding explains."""
    mixing = make_mixing(variant, num_streams)
    width = WIDTHS[aligned]
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator, device=device, dtype=torch.float32)

    weight = random(*mixing.weight_shape(width), scale=0.02)
    parameters = (weight, random(sum(mixing.sizes)), 0.5 + random(3).abs())
    for tokens in TOKENS:
        streams, cotangent = (random(tokens, num_streams, width).to(dtype) for _ in range(2))
        exact = _results(connect, mixing, streams.double(), [p.double() for p in parameters], cotangent.double())
        plain = _results(connect, mixing, streams, parameters, cotangent)
        for name, connection in (("fused", connect_triton), ("in passes", partial(connect_passes, passes=TRITON))):
            found = _results(connection, mixing, streams, parameters, cotangent)
            for what, value in found.items():
                # Both ways round each term of their sums once or twice, by eps / 2, and terms may cancel.
                allowed = 4 * _error(plain[what], exact[what]) + max(8 * torch.finfo(dtype).eps, 1e-5)
                # Not the other way round: an error that is no number is no agreement.
                if not (error := _error(value, exact[what])) <= allowed:
                    return f"{what} of {tokens} tokens, {name}, has a relative error of {error:.1e}, not {allowed:.1e}"
    return None


def _results(
    connection: Callable, mixing: Mixing, streams: Tensor, parameters: Sequence[Tensor], cotangent: Tensor
) -> dict[str, Tensor]:
    """Branch input, new streams and every gradient, around a branch that is not linear."""
    leaves = [tensor.clone().requires_grad_() for tensor in (streams, *parameters)]
    branch_input, write = connection(*leaves, mixing, EPS)
    out = write(torch.tanh(branch_input))
    gradients = torch.autograd.grad(out, leaves, cotangent)
    names = ("streams", "weight", "bias", "alpha")
    results = {f"the gradient of the {name}": value for name, value in zip(names, gradients)}
    return {"the branch input": branch_input.detach(), "the new streams": out.detach()} | results


def _error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()
