"""The text of a study as tokens: training windows drawn by seed, and held-out windows that never change."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .arm import Arm, StudyError
from .inputs import fingerprint, tokenizer_folder


BYTES = 256


@dataclass(frozen=True)
class Corpus:
    """Training tokens `[T]`, held-out windows `[W, L]`, and the bytes of the text that these windows predict.

    Learning rates are chosen on the windows of `validation`.
    """

    train: Tensor
    held_out: Tensor
    held_out_bytes: int
    validation: Tensor


def load_corpus(arm: Arm, shared: Path, cache: Path) -> Corpus:
    """The tokens of an arm's text, made once for each text and tokenizer and then read from `cache`.

    Raises:
        StudyError: if the text is too short for the windows, or no UTF-8.
    """
    path = cache / f"{fingerprint(arm, shared)}.pt"
    tokens = torch.load(path) if path.exists() else _tokenize(arm, shared)
    corpus = _corpus(arm, tokens)
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(tokens, partial)
        os.replace(partial, path)
    return corpus


def _corpus(arm: Arm, tokens: dict[str, Tensor]) -> Corpus:
    windows, starts = _spread_windows(arm, tokens["held_out"])
    # The first token of a window is given, not predicted.
    byte_starts = tokens["byte_starts"]
    predicted = byte_starts[starts + arm.length] - byte_starts[starts + 1]
    validation = _spread_windows(arm, tokens["validation"])[0] if arm.validation_share else windows
    if len(tokens["train"]) <= arm.length:
        raise StudyError(f"the text must have more than {arm.length} tokens to train on. Use a smaller length.")
    return Corpus(tokens["train"], windows, int(predicted.sum()), validation)


def _spread_windows(arm: Arm, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Windows `[W, L]` spread evenly over the tokens, and where each starts."""
    spaces = len(tokens) // arm.length
    if arm.held_out_windows > spaces:
        raise StudyError(
            f"the text must have {arm.held_out_windows} held-out windows of {arm.length} tokens; {arm.text} has "
            f"{spaces}. Use fewer or shorter ones, or a longer text."
        )
    starts = torch.arange(arm.held_out_windows) * spaces // arm.held_out_windows * arm.length
    return torch.stack([tokens[start : start + arm.length] for start in starts.tolist()]), starts


def batches(train: Tensor, length: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Random windows `[batch, length]` for ever, by the seed alone: arms with one seed see the same ones."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(train) - length + 1, (batch,), generator=generator)
        yield torch.stack([train[start : start + length] for start in starts.tolist()])


def vocabulary_size(arm: Arm, shared: Path) -> int:
    """How many different tokens the text of an arm is made of."""
    if arm.tokenizer == "bytes":
        return BYTES
    if arm.tokenizer == "characters":
        return len(_characters(arm, shared))
    return len(_tokenizer(arm, shared))


def _characters(arm: Arm, shared: Path) -> list[str]:
    files = (arm.text, arm.held_out_text)
    return sorted({character for file in files if file for character in _read(shared / file)})


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise StudyError(f"the text must be UTF-8; {path} is not ({error}).") from error


def _tokenizer(arm: Arm, shared: Path) -> Any:
    from transformers import AutoTokenizer

    folder = tokenizer_folder(arm, shared)
    try:
        return AutoTokenizer.from_pretrained(folder, model_max_length=10**9)
    except Exception as error:  # the tokenizers library raises bare exceptions, readers of files any
        raise StudyError(
            f"the model must have a tokenizer beside it; that in {folder} does not load: {error!r}"
        ) from error


def _tokenize(arm: Arm, shared: Path) -> dict[str, Tensor]:
    """Tokens to train on, for validation and held out, and at which byte each of the last starts, one more for the end.

    Shares are of characters; of bytes where bytes are the tokens, so that any file will do.
    """
    if arm.tokenizer == "bytes":
        files = (shared / arm.text, None if arm.held_out_text is None else shared / arm.held_out_text)
        contents = (np.frombuffer(b"" if file is None else file.read_bytes(), np.uint8).copy() for file in files)
        parts = _parts(arm, *(torch.from_numpy(content).long() for content in contents))
        return {**parts, "byte_starts": torch.arange(len(parts["held_out"]) + 1)}
    text = _parts(arm, *(_read(shared / file) if file else "" for file in (arm.text, arm.held_out_text)))
    if arm.tokenizer == "characters":
        number = {character: index for index, character in enumerate(_characters(arm, shared))}
        tokens = {name: torch.tensor([number[c] for c in part], dtype=torch.long) for name, part in text.items()}
        lengths = [len(character.encode()) for character in text["held_out"]]
        return {**tokens, "byte_starts": torch.tensor([0, *accumulate(lengths)])}
    tokenizer = _tokenizer(arm, shared)
    encoded = tokenizer(text["held_out"], add_special_tokens=False, return_offsets_mapping=True)
    byte_of_character = [0, *accumulate(len(character.encode()) for character in text["held_out"])]
    starts = [byte_of_character[start] for start, _ in encoded["offset_mapping"]] + [byte_of_character[-1]]
    others = {name: tokenizer(text[name], add_special_tokens=False)["input_ids"] for name in ("train", "validation")}
    return {
        **{name: torch.tensor(ids, dtype=torch.long) for name, ids in others.items()},
        "held_out": torch.tensor(encoded["input_ids"]),
        "byte_starts": torch.tensor(starts),
    }


def _parts(arm: Arm, text: Any, held_out: Any) -> dict[str, Any]:
    """What is trained on, for validation and held out of a text, or of its bytes."""
    if arm.held_out_text is not None:
        return {"train": text, "validation": text[:0], "held_out": held_out}
    end = round(len(text) * (1 - arm.held_out_share))
    border = end - round(len(text) * arm.validation_share)
    return {"train": text[:border], "validation": text[border:end], "held_out": text[end:]}
