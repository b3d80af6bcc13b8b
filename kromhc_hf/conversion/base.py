"""The base of a conversion: what it must be, where it comes from, and how its files get into the converted folder."""

import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..modeling.foreign_code import check_base_config, without_code
from ..modeling.model_types import PREFIX
from .disk import bring_file
from .files import (
    ADAPTER_CONFIG,
    ADAPTER_TYPE,
    CARD,
    PICKLED_INDEX,
    Weights,
    check_shard,
    companion_files,
    file_names,
    find_weights,
    read_json,
    resolve_source,
    with_weight_variant,
    write_json,
)
from .other_weights import instead_of_weights
from .tensor_files import rewrite_as_safetensors


# How huggingface_hub lays out its cache: models--ORG--NAME/snapshots/COMMIT.
CACHE_FOLDER = re.compile(r"models--(?P<id>[^/]+)")
HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
LICENSE_FIELDS = ("license", "license_name", "license_link")

Fingerprint = tuple[int, int, int]


@dataclass(frozen=True)
class BaseCheckpoint:
    """A full model without hyper-connections, checked and complete, as it is when it is opened.

    Args:
        folder: where it is.
        origin: what is known about it: `base_model` and `base_revision` if it is on the Hub, its `license` fields.
        weights: its weight files and the tensors in them.
        fingerprints: of every file that a conversion uses, before the first was read; None for one that came later.
        weight_variant: which set of weights, where the folder has several.
    """

    folder: Path
    origin: dict[str, Any]
    weights: Weights
    fingerprints: dict[Path, Fingerprint | None]
    weight_variant: str | None = None

    @classmethod
    def open(
        cls,
        source: str | os.PathLike[str],
        revision: str | None = None,
        base_model: str | None = None,
        *,
        subfolder: str = "",
        weight_variant: str | None = None,
        code: bool = False,
    ) -> "BaseCheckpoint":
        """Finds a checkpoint and checks everything that can be seen without reading a tensor.

        Args:
            source: its folder or Hub id.
            revision: of the Hub repository.
            base_model: its Hub id, where the folder does not tell.
            subfolder: where it is in the folder or repository.
            weight_variant: which set of weights, what transformers calls `variant`.
            code: whether its code is wanted too, where it is downloaded.

        Raises:
            FileNotFoundError: if there is no such checkpoint, or it has no weights.
            ValueError: if it is damaged, converted already, an adapter, or names code of another repository; or if
                `base_model` is not a Hub id.
        """
        folder = resolve_source(source, revision, subfolder, code=code, weight_variant=weight_variant)
        present = [*(path for path in folder.iterdir() if path.is_file()), *companion_files(folder)]
        before = {path: _fingerprint(path) for path in present}
        weights = find_weights(folder, _checked_config(folder), weight_variant)
        used = [folder / "config.json", *(folder / file for file in weights.files), *companion_files(folder)]
        # Named as the base is only a repository that gives this model without further words.
        plain = not subfolder and weight_variant is None
        origin = _origin(folder, base_model) if plain or base_model else _license(folder)
        return cls(folder, origin, weights, {path: before.get(path) for path in used}, weight_variant)

    def bring_into(
        self, target: Path, names: Iterable[str], link: str, progress: Callable[[int, int], None]
    ) -> dict[str, str]:
        """Brings weights and companions into a folder; returns which file there holds which tensor.

        Safetensors are copied or linked, `.bin` files rewritten. Code stays behind.

        Args:
            target: the folder, which exists.
            names: how the weight files are called there; further names are not used.
            link: one of `LINKS`.
            progress: called with the bytes done so far and in all.

        Raises:
            OSError: if there is no room, or a file cannot be brought that way.
            ValueError: if a `.bin` file is damaged, or a file changes meanwhile.
        """
        self.check_companions()
        if self.weights.pickled or link not in ("hardlink", "symlink"):
            self._check_space(target.parent)
        files = [*(self.folder / file for file in self.weights.files), *companion_files(self.folder)]
        total, done = sum(path.stat().st_size for path in files), 0

        def advance(amount: int) -> None:
            nonlocal done
            done += amount
            progress(done, total)

        if self.weights.pickled and link in ("hardlink", "symlink"):
            warnings.warn(
                f"link={link!r} has no effect: the weights of {self.folder} are .bin files, which are rewritten as "
                "safetensors and take their own space.",
                stacklevel=3,
            )
        tensors: dict[str, str] = {}
        for file, name in zip(self.weights.files, names):
            if self.weights.pickled:
                held = rewrite_as_safetensors(self.folder / file, target / name, advance)
                index = self.folder / with_weight_variant(PICKLED_INDEX, self.weight_variant)
                check_shard(index, self.weights.tensors, file, held)
            else:
                bring_file(self.folder / file, target / name, link, advance)
                held = [tensor for tensor, holder in self.weights.tensors.items() if holder == file]
            tensors.update(dict.fromkeys(held, name))
        self.bring_companions(target, advance)
        self.check_unchanged()
        return tensors

    def check_companions(self) -> None:
        """Refuses files beside the weights that need code, which does not travel; before anything is brought.

        Raises:
            ValueError: naming the file.
        """
        for companion in filter(_names_code, companion_files(self.folder)):
            _check_code(companion)

    def bring_companions(self, target: Path, advance: Callable[[int], None] = lambda _: None) -> None:
        """Copies tokenizer, generation settings, templates and licence into a folder that lacks them, without code."""
        for companion in companion_files(self.folder):
            copy = target / companion.relative_to(self.folder)
            if not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                bring_file(companion, copy, "copy", advance)
                if _names_code(companion):
                    write_json(copy, without_code(read_json(companion)))

    def check_unchanged(self) -> None:
        """Refuses to go on if one of the files is not what it was.

        Raises:
            ValueError: naming the first file that changed.
        """
        for path, before in self.fingerprints.items():
            if not path.is_file() or before != _fingerprint(path):
                raise ValueError(
                    f"source must not change while it is converted; {path} did, so the result would mix two models. "
                    "Nothing was written. Wait until the source is complete and convert it again."
                )

    def _check_space(self, parent: Path) -> None:
        """Refuses before anything is copied what would not fit."""
        needed, free = sum(path.stat().st_size for path in self.fingerprints), shutil.disk_usage(parent).free
        if needed > free:
            raise OSError(
                f"destination must have room for {needed:,} bytes; {parent} has {free:,}. Free some space, "
                "choose another destination, or use link='hardlink' or 'symlink', which take no space for safetensors."
            )


def _fingerprint(path: Path) -> Fingerprint:
    """What changes when somebody writes to a file: identity, size and time of the last change."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def model_content(folder: Path) -> dict[str, Any]:
    """The content of config.json of a full model.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the folder has an adapter in it, or the file names code of another repository.
    """
    refuse_adapter(folder)
    path = folder / "config.json"
    if not path.is_file():
        instead = instead_of_weights(file_names(folder))
        raise FileNotFoundError(f"a model of transformers must have a config.json; {folder} has none{instead}")
    content = read_json(path)
    if not str(content.get("model_type")).startswith(PREFIX):
        check_base_config(content, path)
    return content


def _checked_config(folder: Path) -> dict[str, Any]:
    """The content of config.json, which must be that of a full model without hyper-connections."""
    content = model_content(folder)
    model_type = str(content.get("model_type", ""))
    if model_type.startswith(PREFIX):
        raise ValueError(
            f"source must be a checkpoint without hyper-connections; {folder} has been converted already "
            f"(model_type {model_type!r}). Convert its base model instead; for newer "
            f"code beside this one: kromhc_hf.update_code({str(folder)!r})."
        )
    return content


def refuse_adapter(folder: Path) -> None:
    """Refuses a folder with an adapter in it.

    Raises:
        ValueError: with the way to a full model, which depends on the method of the adapter.
    """
    path = folder / ADAPTER_CONFIG
    if path.exists():
        own = read_json(path).get("peft_type") == ADAPTER_TYPE
        merge = "Merge the adapter first: merge_and_unload() and save_pretrained()."
        way_out = f"Its full model is what kromhc adapter {folder} DESTINATION writes." if own else merge
        raise ValueError(f"source must be a full model; {folder} has an adapter ({ADAPTER_CONFIG}). {way_out}")


def _origin(folder: Path, base_model: str | None) -> dict[str, Any]:
    """Where the base is on the Hub, by its place in the cache or as the user says, and its licence."""
    if base_model is not None and not HUB_ID.fullmatch(base_model):
        raise ValueError(f"base_model must be a Hub id such as 'ORG/NAME'; got {base_model!r}.")
    snapshot = folder.resolve()
    in_cache = CACHE_FOLDER.fullmatch(snapshot.parents[1].name) if len(snapshot.parents) > 1 else None
    origin: dict[str, Any] = {}
    if in_cache and snapshot.parent.name == "snapshots":
        origin = {"base_model": in_cache["id"].replace("--", "/"), "base_revision": snapshot.name}
    if base_model is not None and base_model != origin.get("base_model"):
        origin = {"base_model": base_model}
    return {**origin, **_license(folder)}


def _license(folder: Path) -> dict[str, Any]:
    license = {name: value for name, value in _card_metadata(folder).items() if name in LICENSE_FIELDS and value}
    return {"license": license} if license else {}


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


def _names_code(companion: Path) -> bool:
    return companion.suffix == ".json" and b'"auto_map"' in companion.read_bytes()


def _check_code(companion: Path) -> None:
    """Refuses a file of the base that needs code, which does not travel."""
    check_base_config(read_json(companion), companion)
    if companion.name == "tokenizer_config.json" and not companion.with_name("tokenizer.json").is_file():
        raise ValueError(
            f"source must have a tokenizer that needs no code of its own; {companion} names some in auto_map and there "
            "is no tokenizer.json. Save a fast tokenizer beside it, or remove tokenizer_config.json."
        )
