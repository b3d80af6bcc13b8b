"""The files of a base checkpoint: what they must be, and how they get into the folder of the converted one."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .checkpoint import check_shard, companion_files, pickled_weights, read_json, weight_map, write_json
from .configuration import PREFIX
from .foreign_code import check_base_config, without_code
from .linking import bring_file
from .pickled import PICKLED_INDEX, rewrite_as_safetensors, safetensors_name


@dataclass(frozen=True)
class BaseWeights:
    """The weight files of a base checkpoint and which tensor is in which; of `.bin` files what their index says."""

    files: tuple[str, ...]
    map: dict[str, str]
    pickled: bool = False


def base_config(folder: Path) -> dict[str, Any]:
    """The configuration file of the base, which must be a full model without hyper-connections."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"source must be a checkpoint of transformers; {folder} has no config.json.")
    raw = read_json(path)
    model_type = raw.get("model_type", "")
    if model_type.startswith(PREFIX):
        raise ValueError(
            f"source must be a checkpoint without hyper-connections; {folder} has been converted already "
            f"(model_type {model_type!r}). Convert its base model instead."
        )
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"source must be a full model; {folder} has an adapter (adapter_config.json). Merge the adapter first: "
            "merge_and_unload() and save_pretrained()."
        )
    check_base_config(raw, path)
    return raw


def base_weights(folder: Path, raw: dict[str, Any]) -> BaseWeights:
    """Which files hold the weights of the base; checks that they are complete."""
    pickled = pickled_weights(folder, raw)
    if pickled is not None:
        return BaseWeights(tuple(pickled[0]), pickled[1], pickled=True)
    names = weight_map(folder, raw)
    return BaseWeights(tuple(sorted(set(names.values()))), names)


def check_space(destination: Path, files: list[Path]) -> None:
    """Refuses before anything is copied what would not fit."""
    needed, free = sum(path.stat().st_size for path in files), shutil.disk_usage(destination.parent).free
    if needed > free:
        raise OSError(
            f"destination must have room for {needed:,} bytes; {destination.parent} has {free:,}. Free some space, "
            "choose another destination, or use link='hardlink' or 'symlink', which take no space for safetensors."
        )


def bring_base(
    folder: Path, target: Path, base: BaseWeights, link: str, progress: Callable[[int, int], None]
) -> BaseWeights:
    """Brings weights and companions along; returns where the tensors are now."""
    companions = companion_files(folder)
    files = [*(folder / name for name in base.files), *companions]
    total, done = sum(path.stat().st_size for path in files), 0

    def advance(amount: int) -> None:
        nonlocal done
        done += amount
        progress(done, total)

    names = dict(base.map)
    for file in base.files:
        if base.pickled:
            held = rewrite_as_safetensors(folder / file, target / safetensors_name(file), advance)
            check_shard(folder / PICKLED_INDEX, base.map, file, held)
            names.update(dict.fromkeys(held, safetensors_name(file)))
        else:
            bring_file(folder / file, target / file, link, advance)
    for companion in companions:
        copy = target / companion.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        bring_file(companion, copy, "copy", advance)
        _leave_code_behind(companion, copy)
    return replace(base, map=names)


def _leave_code_behind(companion: Path, copy: Path) -> None:
    """Takes out of a copied JSON file what names code, which does not travel."""
    if companion.suffix != ".json" or b'"auto_map"' not in companion.read_bytes():
        return
    content = read_json(companion)
    check_base_config(content, companion)
    if companion.name == "tokenizer_config.json" and not companion.with_name("tokenizer.json").is_file():
        raise ValueError(
            f"source must have a tokenizer that needs no code of its own; {companion} names some in auto_map and there "
            "is no tokenizer.json. Save a fast tokenizer beside it, or remove tokenizer_config.json."
        )
    write_json(copy, without_code(content))
