"""Checkpoint folders: which files hold the weights, what is in them, and how a new folder appears all at once."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open


WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
COMPANION_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".vocab", ".bpe")
COMPANION_PREFIXES = ("LICENSE", "NOTICE", "USE_POLICY")
COMPANION_FOLDERS = ("additional_chat_templates",)
COPY_CHUNK = 16 * 2**20


def resolve_source(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder of a checkpoint: `source` itself if it is one, else the downloaded snapshot of that Hub id.

    Raises:
        FileNotFoundError: if it is neither a folder nor a repository that can be read.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FileNotFoundError(f"source must be a folder or a Hub id; got the file {folder}. Give its folder.")
    try:
        patterns = [f"*{suffix}" for suffix in (".safetensors", *COMPANION_SUFFIXES)]
        patterns += [f"{prefix}*" for prefix in COMPANION_PREFIXES]
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"source must be an existing folder or a Hub id that can be read; got {str(source)!r} ({reason}). "
            "Check the path, or the id and your network and token."
        ) from error


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


def weight_map(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Which file holds which tensor, from the safetensors headers alone: `{tensor name: file name}`.

    Every file is checked to be complete, and an index to agree with the files it names.

    Raises:
        FileNotFoundError: if the folder has no safetensors weights, or not all that its index names.
        ValueError: if a file is damaged, or does not hold what the index says.
    """
    name = config.get("transformers_weights") or (WEIGHTS if (folder / WEIGHTS).is_file() else WEIGHTS_INDEX)
    if Path(name).name != name:
        raise ValueError(
            f"transformers_weights must name a file inside the checkpoint; got {name!r}. Correct config.json."
        )
    if not (folder / name).is_file():
        raise FileNotFoundError(
            f"source must hold safetensors weights ({WEIGHTS} or {WEIGHTS_INDEX}); {folder} has no {name}. "
            "Save the model with save_pretrained first."
        )
    if not name.endswith(".index.json"):
        return dict.fromkeys(tensor_names(folder / name), name)
    indexed = read_json(folder / name).get("weight_map")
    if not isinstance(indexed, dict) or not indexed:
        raise ValueError(f"{folder / name} must have a non-empty weight_map; got {indexed!r}. Fetch the file again.")
    for shard in sorted(set(indexed.values())):
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise FileNotFoundError(f"{name} names the file {shard!r}, which {folder} does not have. Fetch it.")
        missing = {tensor for tensor, file in indexed.items() if file == shard} - set(tensor_names(folder / shard))
        if missing:
            raise ValueError(f"{folder / shard} must hold {sorted(missing)[0]!r} according to {name}; it does not.")
    return indexed


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


def companions(folder: Path) -> Iterator[Path]:
    """The files that travel with the weights: tokenizer, generation settings, chat templates, licence."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name in COMPANION_FOLDERS:
            yield path
        elif path.is_file() and not path.name.endswith(".index.json") and path.name != "config.json":
            if path.suffix in COMPANION_SUFFIXES or path.name.startswith(COMPANION_PREFIXES):
                yield path


def copy_file(source: Path, destination: Path, advance: Callable[[int], None] = lambda _: None) -> None:
    """Copies a file; `advance` is told the bytes of each chunk."""
    with source.open("rb") as reader, destination.open("xb") as writer:
        while chunk := reader.read(COPY_CHUNK):
            writer.write(chunk)
            advance(len(chunk))


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A temporary folder beside `destination` that becomes it in one rename when the block succeeds.

    Until then the destination does not exist; when the block fails, or the process dies, no half of it does. What a
    dead process left behind is removed by the next one with the same destination.

    Raises:
        FileExistsError: if the destination exists and is not an empty folder.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(
            f"destination must not exist or be an empty folder; {destination} is not empty. "
            "Choose another destination, or remove it first."
        )
    destination.parent.mkdir(parents=True, exist_ok=True)
    for leftover in destination.parent.glob(f".{destination.name}.partial-*"):
        if not _alive(leftover.name.rpartition("-")[2]):
            shutil.rmtree(leftover)
    folder = destination.parent / f".{destination.name}.partial-{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
        for path in (*folder.rglob("*"), folder):
            _flush_to_disk(path)
        folder.rename(destination)
        _flush_to_disk(destination.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _alive(process_id: str) -> bool:
    if not re.fullmatch(r"\d+", process_id):
        return False
    try:
        os.kill(int(process_id), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _flush_to_disk(path: Path) -> None:
    if path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
