"""Older checkpoints in `.bin` files, rewritten as safetensors shard by shard without running any code in them."""

import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from .safetensors_writer import TensorForm, write_safetensors


PICKLED_WEIGHTS = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"


def safetensors_name(name: str) -> str:
    """`pytorch_model-00001-of-00002.bin` -> `model-00001-of-00002.safetensors`."""
    return name.removeprefix("pytorch_").removesuffix(".bin") + ".safetensors"


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
