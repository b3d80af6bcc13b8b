"""What is in the folder of a checkpoint: its weights, the tensors in them, the files that travel along, its card."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from ..modeling.model_card import MARK
from .other_weights import checkpoint_folders, instead_of_weights


WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PICKLED_WEIGHTS = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
WEIGHT_FILES = (WEIGHTS, WEIGHTS_INDEX, PICKLED_WEIGHTS, PICKLED_INDEX)
# What a push replaces: the files that loaders of full models look for. Earlier versions wrote kromhc.safetensors.
REPLACED_WEIGHTS = re.compile(r"(model(-\d{5}-of-\d{5})?|kromhc)\.safetensors(\.index\.json)?")
CARD = "README.md"
ADAPTER_CONFIG = "adapter_config.json"
# How PEFT calls adapters of hyper-connections.
ADAPTER_TYPE = "KROMHC"
INDEX = re.compile(r".*\.index(\..+)?\.json")
COMPANION_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".vocab", ".bpe")
COMPANION_PREFIXES = ("LICENSE", "NOTICE", "USE_POLICY")
COMPANION_FOLDERS = ("additional_chat_templates",)


def refuse_revision(path: Path, revision: str | None) -> None:
    """Refuses a revision of something on disk.

    Raises:
        ValueError: with the way out.
    """
    if revision is not None:
        raise ValueError(
            f"revision must be of a Hub repository; got {revision!r} with {path}, which has one state alone. "
            "Leave it out, or give the Hub id."
        )


def resolve_source(
    source: str | os.PathLike[str],
    revision: str | None = None,
    subfolder: str = "",
    *,
    code: bool = False,
    weights: bool = True,
    weight_variant: str | None = None,
) -> Path:
    """The folder of a checkpoint: inside `source` if that is a folder, else in the downloaded snapshot of that Hub id.

    Args:
        source: folder or Hub id.
        revision: of the Hub repository.
        subfolder: where in it.
        code: whether Python files are downloaded.
        weights: whether weights are; of several sets one alone.
        weight_variant: which one.

    Raises:
        FileNotFoundError: if it is neither a folder nor a repository that can be read, or has no such subfolder.
        ValueError: if a folder is asked for a revision, or the subfolder would lead out of it.
    """
    if Path(subfolder).is_absolute() or ".." in Path(subfolder).parts:
        raise ValueError(f"subfolder must be a path inside the source; got {subfolder!r}.")
    root, subfolder = Path(source), Path(subfolder).as_posix()
    if root.is_file():
        raise FileNotFoundError(f"source must be a folder or a Hub id; got the file {root}. Give its folder.")
    if not root.is_dir():
        return _download(str(source), revision, subfolder, code, weights, weight_variant)
    refuse_revision(root, revision)
    if not (root / subfolder).is_dir():
        raise _no_subfolder(source, subfolder, file_names(root))
    return root / subfolder


def _download(
    repo_id: str, revision: str | None, subfolder: str, code: bool, weights: bool, weight_variant: str | None
) -> Path:
    """The part of a snapshot that a conversion uses."""
    inside = "" if subfolder == "." else f"{subfolder}/"
    patterns = [f"{inside}*{suffix}" for suffix in (*COMPANION_SUFFIXES, *[".py"] * code)]
    patterns += [f"{prefix}*" for prefix in (*COMPANION_PREFIXES, CARD)]
    try:
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
        if not weights or (folder / subfolder / ADAPTER_CONFIG).exists():
            return folder / subfolder
        for names in _weight_sets(folder / subfolder, weight_variant):
            # From one state of the repository, whatever is pushed to it meanwhile.
            wanted = [inside + name for name in names]
            snapshot_download(repo_id, revision=folder.name, allow_patterns=wanted)
            if any((folder / name).is_file() for name in wanted):
                return folder / subfolder
        names = HfApi().list_repo_files(repo_id, revision=folder.name)
    except (HFValidationError, HTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"source must be an existing folder or a Hub id that can be read; got {repo_id!r} ({reason}). "
            "Check the path, or the id and your network and token."
        ) from error
    there = [name.removeprefix(inside) for name in names if name.startswith(inside)]
    if not there and inside:
        raise _no_subfolder(repo_id, subfolder, names)
    raise FileNotFoundError(f"source must hold safetensors weights; {repo_id} has none{instead_of_weights(there)}")


def _weight_sets(folder: Path, weight_variant: str | None) -> Iterator[list[str]]:
    """The weight files of a checkpoint of which the other files are there, as `find_weights` looks for them."""
    for name in _weight_names(read_json(path) if (path := folder / "config.json").is_file() else {}, weight_variant):
        if not INDEX.fullmatch(name):
            yield [name]
        elif (folder / name).is_file() and isinstance(files := read_json(folder / name).get("weight_map"), dict):
            yield sorted(set(map(str, files.values())))


def _weight_names(config: dict[str, Any], weight_variant: str | None) -> list[str]:
    """The names of weight files or their index, of which the first that there is counts.

    Raises:
        ValueError: if config.json names a file somewhere else.
    """
    named = config.get("transformers_weights")
    if not named:
        return [with_weight_variant(name, weight_variant) for name in WEIGHT_FILES]
    if not isinstance(named, str) or Path(named).name != named:
        raise ValueError(
            f"transformers_weights must name a file inside the checkpoint; got {named!r}. Correct config.json."
        )
    return [named]


def _no_subfolder(source: str | os.PathLike[str], subfolder: str, names: Iterable[str]) -> FileNotFoundError:
    folders = checkpoint_folders(names)
    there = f"there are {', '.join(folders)}" if folders else "no folder in it has a config.json"
    return FileNotFoundError(f"subfolder must be one of {source}; got {subfolder!r}, and {there}.")


def file_names(folder: Path) -> list[str]:
    """The files in a folder and in the folders in it, by their path there."""
    return sorted(path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("*/*")))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: if it does not hold one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be a JSON file; {error}. Fetch the file again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(content).__name__}. Fetch the file again.")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class Weights(NamedTuple):
    """The weight files of a checkpoint, and which of them holds which tensor: `{tensor name: file name}`.

    Of `.bin` files only what their index says is known, which is nothing for a single one.
    """

    files: list[str]
    tensors: dict[str, str]
    pickled: bool


def weight_file_names(count: int) -> list[str]:
    """The standard names of that many safetensors files; tools beside transformers read none of another name."""
    return [WEIGHTS] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def with_weight_variant(name: str, weight_variant: str | None) -> str:
    """`model.fp16.safetensors`, `model.safetensors.index.fp16.json`: the name that transformers gives a variant."""
    stem, _, suffix = name.rpartition(".")
    return name if weight_variant is None else f"{stem}.{weight_variant}.{suffix}"


def find_weights(folder: Path, config: dict[str, Any], weight_variant: str | None = None) -> Weights:
    """The weights of a checkpoint: the files that its config.json names, else safetensors, else `.bin` files.

    Every safetensors file is checked to be complete, and an index to agree with the headers of the files it names.

    Args:
        folder: of the checkpoint.
        config: the content of its config.json.
        weight_variant: which of several sets of weights, what transformers calls `variant`, such as "fp16".

    Raises:
        FileNotFoundError: if the folder has no weights, or not all that its index names.
        ValueError: if a file is damaged, or does not hold what the index says.
    """
    single, index, single_pickled, index_pickled = (with_weight_variant(name, weight_variant) for name in WEIGHT_FILES)
    searched = _weight_names(config, weight_variant)
    name = next((name for name in searched if (folder / name).is_file()), None)
    if name is None:
        missing = index if index in searched else searched[0]
        raise FileNotFoundError(
            f"source must hold safetensors weights ({single} or {index}), or older ones ({single_pickled} or "
            f"{index_pickled}); {folder} has no {missing}{instead_of_weights(file_names(folder))}"
        )
    # transformers reads no .bin file that is named in config.json.
    pickled = not config.get("transformers_weights") and name in (single_pickled, index_pickled)
    if not INDEX.fullmatch(name):
        return Weights([name], {} if pickled else dict.fromkeys(tensor_names(folder / name), name), pickled)
    indexed = read_index(folder / name)
    files = sorted(set(indexed.values()))
    if not pickled:
        for file in files:
            check_shard(folder / name, indexed, file, tensor_names(folder / file))
    return Weights(files, indexed, pickled)


def read_index(path: Path) -> dict[str, str]:
    """The weight map of an index file, `{tensor name: file name}`, with all its files present beside it.

    Raises:
        FileNotFoundError: if one of them is missing.
        ValueError: if there is no weight map.
    """
    indexed = read_json(path).get("weight_map")
    if not isinstance(indexed, dict) or not indexed or not all(isinstance(file, str) for file in indexed.values()):
        raise ValueError(
            f"{path} must have a weight_map with a file name for each tensor; got {indexed!r:.200}. Fetch it again."
        )
    for shard in sorted(set(indexed.values())):
        if Path(shard).name != shard or not (path.parent / shard).is_file():
            raise FileNotFoundError(
                f"{path.name} names the file {shard!r}, which {path.parent} does not have. Fetch it."
            )
    return indexed


def check_shard(index: Path, indexed: dict[str, str], shard: str, names: Iterable[str]) -> None:
    """Refuses a shard that does not hold what its index says.

    Raises:
        ValueError: naming the first tensor that is missing.
    """
    missing = {tensor for tensor, file in indexed.items() if file == shard} - set(names)
    if missing:
        raise ValueError(
            f"{index.parent / shard} must hold {sorted(missing)[0]!r} according to {index.name}; it does not. "
            "Fetch both files again."
        )


def tensor_names(path: Path) -> list[str]:
    """The names of the tensors in a safetensors file; reads the header only.

    Raises:
        ValueError: if the file is truncated or not safetensors.
    """
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} must be a complete safetensors file; {error}. Fetch the file again.") from error


def companion_files(folder: Path) -> list[Path]:
    """The files that travel with the weights: tokenizer, generation settings, chat templates, licence."""
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name in COMPANION_FOLDERS:
            found += sorted(file for file in path.rglob("*") if file.is_file())
        elif path.is_file() and not INDEX.fullmatch(path.name) and path.name != "config.json":
            if path.suffix in COMPANION_SUFFIXES or path.name.startswith(COMPANION_PREFIXES):
                found.append(path)
    return found


def may_write_card(folder: Path) -> bool:
    """Whether the folder has no model card, or one that this package wrote and nobody has made their own."""
    card = folder / CARD
    return not card.is_file() or MARK in card.read_text(encoding="utf-8", errors="replace")
