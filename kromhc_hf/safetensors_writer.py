"""Writes a safetensors file tensor by tensor, so that no more than one tensor is in memory."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class TensorForm(NamedTuple):
    """What the header of a safetensors file says about a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorForm":
        return cls(tensor.dtype, tuple(tensor.shape))


def write_safetensors(
    path: Path, forms: Mapping[str, TensorForm], tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str] = {}
) -> None:
    """Writes the tensors in the order in which they come, which must be that of `forms`.

    Raises:
        ValueError: for a dtype that the format does not have, or a tensor that is not the next one of `forms`.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name, form in forms.items():
        if form.dtype not in DTYPE_NAMES:
            raise ValueError(
                f"{name} must have a dtype that safetensors knows; got {form.dtype}. Save the model in another dtype."
            )
        end = offset + form.nbytes
        header[name] = {"dtype": DTYPE_NAMES[form.dtype], "shape": form.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    expected = iter(forms.items())
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            if (name, TensorForm.of(tensor)) != next(expected, None):
                raise ValueError(f"{name} must be the next tensor of {path.name}, as its header says; it is not.")
            file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if (missing := next(expected, None)) is not None:
            raise ValueError(f"{path.name} must get all tensors that its header names; {missing[0]} did not come.")
