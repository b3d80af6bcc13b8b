"""What a client is: a tool that people already use, how it is told of this package, and what is run with it."""

import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Models:
    """The folders that a check is given: of a plain Llama, or the same with hyper-connections. All have a tokenizer."""

    kind: str  # "base" or "converted"
    start: Path  # converted at the identity init
    tuned: Path  # every parameter moved away from `start`, hyper-connections far from their init
    other: Path  # likewise, in another direction
    adapter: Path  # for the plain model: LoRA, or hyper-connections as an adapter
    plain: Path  # the plain Llama that `start` was made from, and the base of the adapter

    @property
    def converted(self) -> bool:
        return self.kind == "converted"


def models_in(folder: Path, kind: str) -> Models:
    """The models of a kind as `made_models.py` leaves them in a folder."""
    return Models(
        kind, *(folder / kind / name for name in ("start", "tuned", "other", "adapter")), folder / "base/start"
    )


@dataclass(frozen=True)
class Check:
    """One run of a tool, with the base model as control.

    `run` gets the models and an empty folder, and returns what it found. It runs with the base first; `agree` then
    says in a few words what both show, and raises AssertionError where the converted models do not do as they should.
    Without `agree`, `run` is called with the converted models alone, compares what it needs itself and says what it
    saw.
    """

    what: str  # the first cell of its row
    run: Callable[[Models, Path], Any]
    agree: Callable[[Any, Any], str] | None = None


@dataclass(frozen=True)
class Client:
    """A tool, or why it is not run."""

    tool: str  # as people call it
    requirements: tuple[
        str, ...
    ]  # for pip, the first of the tool itself with its version; those named are not constrained
    use: str  # the line that makes it work, in Markdown
    checks: tuple[Check, ...] = ()
    source: str = ""  # of a tool that is not run: what reading its source said
    package: bool = True  # whether this package is installed beside it
    without: tuple[str, ...] = ()  # packages that it brings along and that do not fit this machine
    python: str = ""  # an interpreter, if not that of the project


def command(*words: object, folder: Path, variables: Mapping[str, str] | None = None) -> str:
    """What a command prints on both streams, run in a folder.

    Raises:
        RuntimeError: if it fails, with what it printed.
    """
    environment = {**os.environ, **(variables or {})}
    done = subprocess.run(
        list(map(str, words)),
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{words[0]} exits with {done.returncode}: {done.stdout}")
    return done.stdout


def same(base: Any, converted: Any) -> str:
    """For `agree`: nothing differs, which the identity init promises."""
    assert converted == base, f"the base gives {base}, converted {converted}"
    return f"the numbers of the base: {shown(base)}"


def shown(found: Any) -> str:
    """Numbers as a table has them."""
    if isinstance(found, Mapping):
        return ", ".join(f"{name} {shown(value)}" for name, value in found.items())
    if isinstance(found, (list, tuple)):
        return ", ".join(map(shown, found))
    return f"{found:.4g}" if isinstance(found, float) else str(found)
