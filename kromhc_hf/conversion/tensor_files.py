"""Files of tensors: safetensors written one tensor at a time, and older `.bin` files rewritten as safetensors.

No more than one tensor has to be in memory, and nothing that a `.bin` file holds is ever run.
"""

import json
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
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


def tensor_bytes(path: Path) -> int:
    """The size of the tensors in a safetensors file, in bytes, without its header."""
    with path.open("rb") as file:
        length = file.read(8)
    return path.stat().st_size - len(length) - int.from_bytes(length, "little")


def rewrite_as_safetensors(source: Path, target: Path, advance: Callable[[int], None] = lambda _: None) -> list[str]:
    """Writes the tensors of a `.bin` file to a safetensors file and returns their names.

    The values are not changed. Tensors that share memory are written in full, once under each name.

    Raises:
        ValueError: if the file is damaged, holds anything but tensors, or would run code when it is read.
    """
    tensors = read_pickled(source)
    # Wide dtypes first, so that every tensor is aligned in the file.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    forms = {name: TensorForm.of(tensors[name]) for name in names}

    def one_by_one() -> Iterator[tuple[str, Tensor]]:
        for name in names:
            yield name, tensors[name]
            advance(forms[name].nbytes)

    write_safetensors(target, forms, one_by_one())
    return names


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.bin` file, mapped from disk where its format allows.

    Raises:
        ValueError: if the file is damaged, holds anything but tensors, or would run code when it is read.
    """
    try:
        # Files of torch before 1.6 are no archives and cannot be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} must be a complete file of torch.save that holds tensors alone; {reason} "
            "Fetch the file again, or a safetensors version of the model."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise ValueError(
            f"{path} must hold a dictionary of tensors; got {_describe(content)}. "
            "Save the model with save_pretrained first."
        )
    return content


def _describe(content: object) -> str:
    if not isinstance(content, dict):
        return type(content).__name__
    name, value = next((name, value) for name, value in content.items() if not isinstance(value, Tensor))
    return f"{type(value).__name__} under {name!r}"
