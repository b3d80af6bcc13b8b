"""The text of a study as tokens: training windows drawn by seed, and held-out windows that never change."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.study.config import Arm, StudyError


HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Corpus:
    """Training tokens `[T]`, held-out windows `[W, L]`, and the bytes of the text that these windows predict."""

    train: Tensor
    held_out: Tensor
    held_out_bytes: int


def load_corpus(arm: Arm, shared: Path, cache: Path) -> Corpus:
    """The tokens of an arm's text, made once for each text and tokenizer and then read from `cache`.

    Raises:
        StudyError: if the text is too short for the windows.
    """
    path = cache / f"{_fingerprint(arm, shared)}.pt"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(_tokenize(arm, shared), path)
    tokens = torch.load(path)
    held_out, byte_starts = tokens["held_out"], tokens["byte_starts"]
    spaces = len(held_out) // arm.length
    if arm.held_out_windows > spaces or len(tokens["train"]) <= arm.length:
        raise StudyError(
            f"the text must have {arm.held_out_windows} held-out windows of {arm.length} tokens; {arm.text} has "
            f"{spaces}. Use a smaller held_out_windows or length."
        )
    starts = torch.arange(arm.held_out_windows) * spaces // arm.held_out_windows * arm.length
    # The first token of a window is given, not predicted.
    predicted = byte_starts[starts + arm.length] - byte_starts[starts + 1]
    windows = torch.stack([held_out[start : start + arm.length] for start in starts.tolist()])
    return Corpus(tokens["train"], windows, int(predicted.sum()))


def batches(train: Tensor, length: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Random windows `[batch, length]` for ever, by the seed alone: arms with one seed see the same ones."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(train) - length + 1, (batch,), generator=generator)
        yield torch.stack([train[start : start + length] for start in starts.tolist()])


def tokenizer_folder(arm: Arm, shared: Path) -> Path:
    return shared / (arm.tokenizer or arm.model or "")


def _fingerprint(arm: Arm, shared: Path) -> str:
    """Names a pair of text and tokenizer by their contents."""
    digest = hashlib.sha256(repr((arm.text, arm.held_out_text)).encode())
    for file in (arm.text, arm.held_out_text):
        digest.update(b"" if file is None else (shared / file).read_bytes())
    digest.update((tokenizer_folder(arm, shared) / "tokenizer.json").read_bytes())
    return digest.hexdigest()[:16]


def _tokenize(arm: Arm, shared: Path) -> dict[str, Tensor]:
    """Training tokens, held-out tokens, and at which byte each of the latter starts, with the end as one more."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(arm, shared), model_max_length=10**9)
    train = (shared / arm.text).read_text(encoding="utf-8")
    if arm.held_out_text is not None:
        held_out = (shared / arm.held_out_text).read_text(encoding="utf-8")
    else:
        border = round(len(train) * (1 - HELD_OUT_SHARE))
        train, held_out = train[:border], train[border:]
    encoded = tokenizer(held_out, add_special_tokens=False, return_offsets_mapping=True)
    byte_of_character = [0, *accumulate(len(character.encode()) for character in held_out)]
    starts = [byte_of_character[start] for start, _ in encoded["offset_mapping"]] + [byte_of_character[-1]]
    return {
        "train": torch.tensor(tokenizer(train, add_special_tokens=False)["input_ids"]),
        "held_out": torch.tensor(encoded["input_ids"]),
        "byte_starts": torch.tensor(starts),
    }
