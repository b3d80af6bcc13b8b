"""Folders with an adapter of hyper-connections and folders with a full model, one from the other."""

import os
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from .checkpoint import companion_files, read_json, resolve_source
from .folders import new_folder
from .linking import bring_file
from .modeling import KromHCForCausalLM
from .peft_conversion import adapter_to_model, model_to_adapter


ADAPTER_CONFIG = "adapter_config.json"


def adapter_to_checkpoint(source: str | os.PathLike[str], destination: str | os.PathLike[str]) -> None:
    """Writes the full model that an adapter and its base make, with the base's tokenizer and generation files.

    Args:
        source: folder of an adapter that was made with `KromHCPeftConfig`; it names its base.
        destination: folder to make; must not exist or be empty.

    Raises:
        FileNotFoundError: if the base cannot be found.
        FileExistsError: if the destination is not empty.
        ValueError: if the adapter is of another method.
    """
    base = resolve_source(read_json(Path(source) / ADAPTER_CONFIG)["base_model_name_or_path"])
    model = adapter_to_model(AutoPeftModelForCausalLM.from_pretrained(source))
    with new_folder(Path(destination)) as folder:
        model.save_pretrained(folder)
        for file in companion_files(base):
            copy = folder / file.relative_to(base)
            if not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                bring_file(file, copy)


def checkpoint_to_adapter(
    source: str | os.PathLike[str], destination: str | os.PathLike[str], base: str | os.PathLike[str]
) -> None:
    """Writes the hyper-connections of a model as an adapter of its base, whose other tensors must be the same.

    Args:
        source: folder of a model with hyper-connections.
        destination: folder to make; must not exist or be empty.
        base: folder or Hub id of the base, on which the adapter is to be loaded.

    Raises:
        FileExistsError: if the destination is not empty.
        ValueError: if the base has other weights than the model.
    """
    model = KromHCForCausalLM.from_pretrained(source, dtype="auto")
    own = model.state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(base, dtype="auto").state_dict().items():
        if name not in own or not torch.equal(own[name], tensor):
            raise ValueError(
                f"the base of an adapter must have the same weights as the model; {base} differs in {name!r}. "
                "A model whose backbone was trained has to stay a full model."
            )
    with new_folder(Path(destination)) as folder:
        model_to_adapter(model, folder, str(base))
