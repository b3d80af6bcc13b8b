"""What is in the files that an arm names: a run of other contents under the same names is another run."""

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

from .arm import PLAIN_TOKENIZERS, Arm


WEIGHTS = ("config.json", "*.safetensors", "*.bin")
TOKENIZER = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "spiece*",
    "sentencepiece*",
    "special_tokens_map.json",
    "added_tokens.json",
)
CHUNK = 1 << 20


def inputs(arm: Arm, shared: Path) -> str:
    """A digest of an arm's text, tokenizer and model, by their contents."""
    model = [] if arm.model is None else _matching(shared / arm.model, WEIGHTS)
    return _digest((*text_and_tokenizer(arm, shared), *model))


def fingerprint(arm: Arm, shared: Path) -> str:
    """Names a text, its shares and a tokenizer by their contents."""
    plain = arm.tokenizer if arm.tokenizer in PLAIN_TOKENIZERS else None
    shares = (arm.text, arm.held_out_text, arm.held_out_share, arm.validation_share, plain)
    return hashlib.sha256((repr(shares) + _digest(text_and_tokenizer(arm, shared))).encode()).hexdigest()[:16]


def text_and_tokenizer(arm: Arm, shared: Path) -> list[Path]:
    texts = [shared / file for file in (arm.text, arm.held_out_text) if file is not None]
    plain = arm.tokenizer in PLAIN_TOKENIZERS
    return texts if plain else [*texts, *_matching(tokenizer_folder(arm, shared), TOKENIZER)]


def tokenizer_folder(arm: Arm, shared: Path) -> Path:
    return shared / (arm.tokenizer or arm.model or "")


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _digest(files: Iterable[Path]) -> str:
    found = [(file.name, _digest_of_file(file, file.stat().st_size, file.stat().st_mtime_ns)) for file in files]
    return hashlib.sha256(repr(found).encode()).hexdigest()


@functools.cache
def _digest_of_file(file: Path, size: int, changed: int) -> str:
    """Of the contents; size and time tell when to look again."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
