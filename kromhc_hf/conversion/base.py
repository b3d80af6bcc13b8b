"""The files of a base checkpoint: what they must be, and how they get into the folder of the converted one."""

import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ..modeling.configuration_kromhc import PREFIX
from ..modeling.foreign_code import check_base_config, without_code
from .disk import bring_file
from .files import CARD, check_shard, companion_files, pickled_weights, read_json, weight_map, write_json
from .tensor_files import PICKLED_INDEX, rewrite_as_safetensors, safetensors_name


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


# How huggingface_hub lays out its cache: models--ORG--NAME/snapshots/COMMIT.
CACHE_FOLDER = re.compile(r"models--(?P<id>[^/]+)")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")
LICENSE_FIELDS = ("license", "license_name", "license_link")


def origin_of(source: str | os.PathLike[str], folder: Path, base_model: str | None = None) -> dict[str, Any]:
    """What is known about a base: `base_model` and `base_revision` if it is on the Hub, and its `license` fields.

    Args:
        source: as the user gave it, a folder or a Hub id.
        folder: where it is.
        base_model: its Hub id, if the user said so.

    Raises:
        ValueError: if `base_model` is not a Hub id.
    """
    if base_model is not None and not HUB_ID.fullmatch(base_model):
        raise ValueError(f"base_model must be a Hub id such as 'ORG/NAME'; got {base_model!r}.")
    snapshot = folder.resolve()
    in_cache = CACHE_FOLDER.fullmatch(snapshot.parents[1].name) if len(snapshot.parents) > 1 else None
    origin: dict[str, Any] = {}
    if in_cache and snapshot.parent.name == "snapshots":
        origin = {"base_model": in_cache["id"].replace("--", "/"), "base_revision": snapshot.name}
    if base_model is not None and base_model != origin.get("base_model"):
        origin = {"base_model": base_model}
    license = {name: value for name, value in _card_metadata(folder).items() if name in LICENSE_FIELDS and value}
    return {**origin, "license": license} if license else origin


def _card_metadata(folder: Path) -> dict[str, Any]:
    """The metadata at the top of a model card; empty where there is none that can be read."""
    path = folder / CARD
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    try:
        metadata = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return metadata if isinstance(metadata, dict) else {}


def fingerprints(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """What changes when somebody writes to a file of the folder: identity, size and time of the last change."""
    paths = [path for path in folder.iterdir() if path.is_file()]
    return {path: _fingerprint(path) for path in (*paths, *companion_files(folder))}


def check_unchanged(before: dict[Path, tuple[int, int, int]], used: Iterable[Path]) -> None:
    """Refuses to go on if one of the files is not what it was.

    Raises:
        ValueError: naming the first file that changed.
    """
    for path in used:
        if not path.is_file() or before.get(path) != _fingerprint(path):
            raise ValueError(
                f"source must not change while it is converted; {path} did, so the result would mix two models. "
                "Nothing was written. Wait until the source is complete and convert it again."
            )


def _fingerprint(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
