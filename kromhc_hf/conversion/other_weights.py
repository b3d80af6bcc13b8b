"""What a checkpoint without weights that can be converted has instead, and the way from there."""

import re
from collections.abc import Iterable


# `model.fp16.safetensors`, `model.safetensors.index.fp16.json`, `pytorch_model.fp16.bin`.
VARIANT = re.compile(
    r"(?:pytorch_)?model(?:\.(?:safetensors|bin)\.index\.([^.]+)\.json|\.([^.]+)\.(?:safetensors|bin))"
)
SAVE = "Save the model with save_pretrained where it can be loaded"
# By the end of a file name.
FORMATS = {
    ".gguf": (
        "GGUF weights",
        "Load them with AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file={name!r}), which dequantises them, and "
        "save the model with save_pretrained",
    ),
    ".safetensors": ("a name by which transformers reads no weights", SAVE),
    ".bin": ("a name by which transformers reads no weights", SAVE),
    ".h5": ("TensorFlow weights", SAVE),
    ".msgpack": ("Flax weights", SAVE),
    ".onnx": ("an ONNX graph", SAVE),
    ".pth": ("a pickled file", SAVE),
    ".pt": ("a pickled file", SAVE),
    ".ckpt": ("a pickled file", SAVE),
}


def instead_of_weights(names: Iterable[str]) -> str:
    """The end of a message that the weights are missing.

    Args:
        names: the files of the checkpoint, by their path in it.
    """
    names = sorted(names)
    variants = {found[1] or found[2] for name in names if (found := VARIANT.fullmatch(name))}
    if variants:
        one, there = min(variants), f" but the variant {', '.join(sorted(variants))}"
        return f"{there}. A base is converted and verified with weight_variant={one!r}, --weight-variant {one}."
    for suffix, (what, way_out) in FORMATS.items():
        found_names = [name for name in names if name.endswith(suffix) and "/" not in name]
        if found_names:
            return f" but {found_names[0]} ({what}). {way_out.format(name=found_names[0])}."
    folders = checkpoint_folders(names)
    if folders:
        one, there = folders[0], f" but there is a checkpoint in {', '.join(folders)}"
        return f"{there}. A base is converted and verified with subfolder={one!r}, --subfolder {one}."
    return f". {SAVE.replace('where it can be loaded', 'first')}."


def checkpoint_folders(names: Iterable[str]) -> list[str]:
    """The folders with a config.json among files that are named by their path."""
    return [name.removesuffix("/config.json") for name in names if name.endswith("/config.json")]
