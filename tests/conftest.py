import gc
import os
import sys
from pathlib import Path

import pytest


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch


torch.set_num_threads(int(os.environ.get("KROMHC_TEST_THREADS", "1")))


def pytest_collection_finish() -> None:
    """Leaves what is imported by now out of garbage collections, each of which would go through a million objects."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real checkpoints, texts and golden files, which a user's machine does not have."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("KROMHC_SHARED", default))
    if not folder.is_dir():
        pytest.skip(f"no shared folder at {folder}; set KROMHC_SHARED to one")
    return folder


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def nothing_registered():
    """Leaves no family from outside behind."""
    from support.outside import forget_families

    yield
    forget_families()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that the client of this process talks to, with the right token and an empty cache."""
    # Imported late, since most tests do without.
    from support.hub_client import turn_client_to
    from support.hub_server import HubServer

    with HubServer() as server:
        turn_client_to(server, monkeypatch, tmp_path / "cache")
        yield server


@pytest.fixture
def kromhc(monkeypatch, capsys):
    """Runs the command in this process: `kromhc("convert", ...)` -> (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["kromhc", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        # Imported late, since every other test does without.
        from kromhc_hf.cli import main

        with pytest.raises(SystemExit) as exit_:
            main()
        return exit_.value.code or 0, *capsys.readouterr()

    return run
