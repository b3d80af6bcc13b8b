# Code of kromhc-hf, which travels with every model that it saves.
"""What is known of values on a CPU at no cost: whether streams are equal, and small tensors that never change."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def keeps(beside: Tensor) -> bool:
    """Whether a small tensor that is always the same may be made once, to be used beside this one."""
    return not torch.compiler.is_compiling() and beside.is_cpu and type(beside) in (Tensor, nn.Parameter)


def may_look(tensor: Tensor) -> bool:
    """Whether the values may be looked at, which is free on a CPU; a traced, transformed or fake tensor has none."""
    return keeps(tensor) and not (torch.jit.is_tracing() or transformed())


def transformed() -> bool:
    """Whether forward-mode derivatives or transforms of `torch.func` are under way, which know plain operations alone.

    Tensors do not tell: a weight of the model inside a branch may be what is differentiated.
    """
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def refuse_batched(*grads: Tensor | None) -> None:
    """Refuses many gradients at once, for which the passes over the streams have no rule.

    Raises:
        RuntimeError: with the way out.
    """
    if any(grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads):
        raise RuntimeError(
            "is_grads_batched must be False unless every hyper-connection has kernel='reference'; got many gradients "
            "at once. Set that kernel, or use torch.func.vmap around the function of torch.func.vjp."
        )


def all_equal(streams: Tensor) -> bool:
    """Whether every token `[..., n, C]` has n equal streams. A comparison ends at the first that differ."""
    if streams.stride(-2) == 0:
        return True
    # Compared bit by bit, in the widest pieces: twice as fast in fp32 as number by number.
    count = 8 // streams.itemsize
    if count > 1 and streams.is_contiguous() and streams.shape[-1] % count == streams.storage_offset() % count == 0:
        streams = streams.view(torch.int64)
    others = streams.shape[-2] - 1
    return torch.equal(streams.narrow(-2, 0, others), streams.narrow(-2, 1, others))


_KEPT: dict[tuple[Any, ...], Tensor] = {}


def kept(make: Callable[..., Tensor], *known: Any) -> Tensor:
    """What `make` makes of these values on the CPU, once; nothing is kept that belongs to a mode it is asked for in.

    For use beside a tensor that `keeps`.
    """
    key = (make, *known)
    if key in _KEPT:
        return _KEPT[key]
    # One of inference mode could not be saved for a backward pass, one of a transform or a fake one has no values.
    with torch.inference_mode(False):
        made = make(*known)
    if type(made) is Tensor and not transformed():
        _KEPT[key] = made
    return made


def _make_number(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype, device="cpu")


def _make_indices(sizes: tuple[int, ...]) -> Tensor:
    return torch.tensor([part for part, size in enumerate(sizes) for _ in range(size)], device="cpu")


def kept_indices(sizes: tuple[int, ...]) -> Tensor:
    """To which part each of `sum(sizes)` elements belongs, in parts of these sizes."""
    return kept(_make_indices, sizes)


def number(value: float, like: Tensor) -> Tensor | float:
    """A number for use beside a tensor: as one without dimensions where that is made once, or else as it is.

    Operations that are given a number make a tensor of it first, which takes longer than what they do for a token.
    """
    return kept(_make_number, value, like.dtype) if keeps(like) else value


def number_tensor(value: float, like: Tensor) -> Tensor:
    """A number as a tensor without dimensions, for operations that take nothing else there."""
    return kept(_make_number, value, like.dtype) if keeps(like) else like.new_full((), value)
