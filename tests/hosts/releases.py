"""Releases of transformers, each in a folder of its own that goes in front of the installed packages."""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, PathDistribution, version
from pathlib import Path

from packaging.requirements import Requirement


ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("KROMHC_HOSTS", ROOT / ".hosts"))
# The floor, what servers and trainers pin, the one before the newest, and those between which something changed.
MATRIX = ("5.6.2", "5.10.4", "5.13.1", "5.16.1", "5.19.0", "5.20.2", "5.23.0", "5.24.0")
FLOOR = MATRIX[0]
# What a release may need in another version than the environment has, and what that brings along.
PINNED = {"huggingface-hub": ("httpx", "httpcore", "h11", "anyio"), "tokenizers": ()}


def number(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))


def _pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", *arguments, "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def newest() -> str:
    """The newest release on the index.

    Raises:
        RuntimeError: if the index cannot be read.
    """
    found = re.search(r"^Available versions: ([\d.]+)", _pip("index", "versions", "transformers"), re.MULTILINE)
    if found is None:
        raise RuntimeError("the index must list releases of transformers; it lists none")
    return found[1]


def matrix() -> tuple[str, ...]:
    """All releases that are swept, ascending, with the newest on the index."""
    return tuple(sorted({*MATRIX, newest()}, key=number))


def install(release: str) -> Path:
    """The folder with a release of transformers, installed when it is first asked for.

    Torch and all other packages are those of the environment, but for what the release pins otherwise.

    Raises:
        RuntimeError: if pip cannot install it.
    """
    folder = FOLDER / release
    if not folder.is_dir():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as made:
            target = Path(made) / release
            _pip("install", "--quiet", "--target", str(target), "--no-deps", f"transformers=={release}")
            others = _other_requirements(target)
            if others:
                _pip("install", "--quiet", "--target", str(target), "--no-deps", *others)
            with contextlib.suppress(OSError):  # another process was faster
                target.rename(folder)
    return folder


def _other_requirements(target: Path) -> list[str]:
    """What the release in a folder needs that the environment does not have in that version."""
    (metadata,) = target.glob("transformers-*.dist-info")
    needed = []
    for requirement in map(Requirement, PathDistribution(metadata).requires or ()):
        if requirement.name not in PINNED or requirement.marker is not None:
            continue
        try:
            fits = version(requirement.name) in requirement.specifier
        except PackageNotFoundError:
            fits = False
        if not fits:
            needed += [f"{requirement.name}{requirement.specifier}", *PINNED[requirement.name]]
    return needed


def environment(release: str, path: Path, home: Path) -> dict[str, str]:
    """The variables of a process that runs with a release: nothing of the Hub, and a cache of its own.

    Args:
        release: of transformers.
        path: what else is imported before what is installed.
        home: folder of the cache.
    """
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(map(str, (install(release), path))),
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
