# Code of kromhc-hf, which travels with every model that it saves.
"""What is known of values on a CPU at no cost: whether streams are equal, and small tensors that never change."""

import functools

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def keeps(beside: Tensor) -> bool:
    """Whether a small tensor that is always the same may be made once, to be used beside this one."""
    return beside.is_cpu and type(beside) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()


def may_look(tensor: Tensor) -> bool:
    """Whether the values may be looked at, which is free on a CPU; a traced or a fake tensor has none."""
    return keeps(tensor) and not torch.jit.is_tracing()


def transformed() -> bool:
    """Whether forward-mode derivatives or transforms of `torch.func` are under way, which know plain operations alone.

    Tensors do not tell: a weight of the model inside a branch may be what is differentiated.
    """
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def all_equal(streams: Tensor) -> bool:
    """Whether every token `[T, n, C]` has n equal streams. Streams that differ mostly do so in the first token."""
    if streams.stride(1) == 0:
        return True
    tokens = streams.shape[0]
    if tokens > 0:
        token = streams[0]
        if not torch.equal(token[:-1], token[1:]):
            return False
        if tokens == 1:
            return True
    # Compared bit by bit, in the widest pieces: twice as fast in fp32 as number by number.
    count = 8 // streams.itemsize
    if count > 1 and streams.is_contiguous() and streams.shape[2] % count == streams.storage_offset() % count == 0:
        streams = streams.view(torch.int64)
    return torch.equal(streams[:, :-1], streams[:, 1:])


# Operations that are given a number make a tensor of it first, which takes longer than what they do for a token. What
# is made in inference mode could not be saved for a backward pass.
@functools.cache
def _kept_number(value: float, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")


@functools.cache
def kept_indices(sizes: tuple[int, ...]) -> Tensor:
    """To which part each of `sum(sizes)` elements belongs, in parts of these sizes."""
    with torch.inference_mode(False):
        return torch.tensor([part for part, size in enumerate(sizes) for _ in range(size)], device="cpu")


def number(value: float, like: Tensor) -> Tensor | float:
    """A number for use beside a tensor: as one without dimensions where that is made once, or else as it is."""
    return _kept_number(value, like.dtype) if keeps(like) else value


def number_tensor(value: float, like: Tensor) -> Tensor:
    """A number as a tensor without dimensions, for operations that take nothing else there."""
    return _kept_number(value, like.dtype) if keeps(like) else like.new_full((), value)
