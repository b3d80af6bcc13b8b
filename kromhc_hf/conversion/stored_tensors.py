"""The tensors of a checkpoint folder, read when they are asked for, and whether they are those that a model needs."""

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from ..modeling.host import load_tensors, tie_missing
from .files import find_weights, read_json
from .quantised import quantization_of
from .tensor_files import read_pickled


# How many tensors a message names.
NAMED = 4


class StoredTensors:
    """The tensors of a checkpoint, in safetensors or `.bin` files.

    Args:
        folder: of the checkpoint.
        weight_variant: which set of weights, where it has several.

    Raises:
        FileNotFoundError: if there are no weights.
        ValueError: if a file is damaged.
    """

    def __init__(self, folder: Path, weight_variant: str | None = None):
        weights = find_weights(folder, read_json(folder / "config.json"), weight_variant)
        self.folder = folder
        self.files: dict[str, str] = {} if weights.pickled else weights.tensors
        self.pickled: dict[str, Tensor] = {}
        for file in weights.files if weights.pickled else ():
            self.pickled.update(read_pickled(folder / file))
        self.names = [*self.files, *self.pickled]

    def read(self, names: Iterable[str]) -> dict[str, Any]:
        """Tensors, or slices of files that are read where they are used; files stay open no longer than those."""
        names = list(names)
        shards = {
            file: safe_open(self.folder / file, "pt") for file in {self.files[n] for n in names if n in self.files}
        }
        return {n: shards[self.files[n]].get_slice(n) if n in self.files else self.pickled[n] for n in names}

    def on_meta(self) -> dict[str, Tensor]:
        """Every tensor without its values; reads headers only."""
        stored = self.read(self.names).items()
        shapes = {n: value.shape if isinstance(value, Tensor) else value.get_shape() for n, value in stored}
        return {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}

    def dtype(self, config: Any) -> torch.dtype | str:
        """The dtype that the model is stored in: what its configuration says, or that of its first float tensor."""
        if getattr(config, "dtype", None) is not None:
            return config.dtype
        first = (self.read([name])[name][:] for name in self.names)
        return next((tensor.dtype for tensor in first if tensor.is_floating_point()), torch.float32)


def check_tensors(
    model: Any, tensors: StoredTensors, besides: Collection[str] = (), only: re.Pattern[str] | None = None
) -> None:
    """Refuses a checkpoint that lacks a tensor of a model or has one in another shape.

    One that the model has not, such as a value head or a mask that releases long ago saved, does no harm: transformers
    reports it and leaves it out. Asked is the loader of transformers itself, with tensors that have no values: it knows
    about tied heads, merged experts, and what a family leaves out. Of a quantised checkpoint, whose tensors have other
    names and shapes, only modules without any tensor are seen.

    Args:
        model: on the meta device, where its parameters stay.
        tensors: the checkpoint.
        besides: the names of tensors that the model has and the checkpoint must not have.
        only: tensors by these names must be the model's, where whoever reads them knows of no others.

    Raises:
        ValueError: naming the tensors.
    """
    stored, quantized = tensors.on_meta(), quantization_of(model.config) is not None
    conversions: Any = get_model_conversion_mapping(model)
    with quiet_loading():
        info = load_tensors(model, stored, LoadStateDictConfig(device_map={"": "meta"}, weight_mapping=conversions))
        tie_missing(model, info.missing_keys)
    model._adjust_missing_and_unexpected_keys(info)
    unexpected = stored.keys() & set(besides)
    if only is not None:
        unexpected |= {name for name in info.unexpected_keys if only.search(name)}
    missing = set(info.missing_keys) - set(besides)
    if quantized:
        present = {*stored, *info.unexpected_keys}
        missing = {name for name in missing if not _has_tensor(present, name.rpartition(".")[0])}
    problems = {"it lacks": sorted(missing), "it has beside them": sorted(unexpected)}
    if not quantized:
        mismatched = sorted(f"{n} {list(there)}, not {list(must)}" for n, there, must in info.mismatched_keys)
        incomplete = sorted(info.conversion_errors)
        problems |= {"it has in another shape": mismatched, "it has in part": incomplete}
    found = [f"{what} {_enumerated(names)}" for what, names in problems.items() if names]
    if found:
        name = getattr(model, "backbone_class", type(model)).__name__
        drop = f", or load it with {name}.from_pretrained and save it with save_pretrained, which drops the rest"
        raise ValueError(
            f"a checkpoint must hold the tensors of its class, {name}; {tensors.folder} does not: {'; '.join(found)}. "
            "Fetch its files again, or correct the class that config.json names in architectures"
            f"{drop * (len(found) == 1 and bool(unexpected))}."
        )


class Place(NamedTuple):
    """Where a stored tensor goes: the name in the model, and whether it gets there as it is stored."""

    name: str
    as_it_is: bool


def places_in_model(model: Any, names: Iterable[str]) -> dict[str, Place]:
    """Where transformers puts stored tensors of these names, which families may have under others."""
    conversions: Any = get_model_conversion_mapping(model)
    renamings = [step for step in conversions if isinstance(step, WeightRenaming)]
    converters = [step for step in conversions if isinstance(step, WeightConverter)]
    prefix, known = model.base_model_prefix, model.state_dict()
    found = {name: rename_source_key(name, renamings, converters, prefix, known) for name in names}
    return {name: Place(inside, converter is None) for name, (inside, converter) in found.items()}


def _has_tensor(names: Iterable[str], module: str) -> bool:
    # Heads add the name of the base model in front of its modules, or leave it out.
    return any(f".{name}".find(f".{module}.") >= 0 or f"{module}.".endswith(f".{name}.") for name in names)


def _enumerated(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" * (len(names) > NAMED)
    return ", ".join(names[:NAMED]) + more


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without the bar and the report of transformers: what it finds comes as an error."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
