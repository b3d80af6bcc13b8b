"""A study of the embedded model, its command, and training replaced by a formula."""

import sys
from pathlib import Path

import pytest
import yaml


sys.path.append(str(Path(__file__).resolve().parents[2]))
from support.study import DEFAULTS, DEMO_DATA

from benchmarks.study import __main__ as command_line
from kromhc_hf.study import training as study_training


@pytest.fixture
def study_file(tmp_path):
    """Writes a study of the embedded model: `study_file(arms={...}, seeds=2)` -> its path."""

    def write(**changes):
        content = {"seeds": 2, "reference": "base", "defaults": DEFAULTS, "arms": {"base": {}}} | changes
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


@pytest.fixture
def command(tmp_path, capsys):
    """Runs the study in this process: `command(path, ...)` -> (exit code, stdout, stderr)."""

    def run(path, *more):
        code = command_line.main(
            [str(path), "--output", str(tmp_path / "out"), "--workers", "1", "--shared", str(DEMO_DATA), *more]
        )
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def fast_runs(monkeypatch):
    """Replaces training by a loss that the settings and the seed give; returns the list of runs done."""
    done = []

    def run(arm, seed, shared, cache, report, device):
        done.append((arm.lr, seed))
        report(arm.steps, 1.0)
        loss = 1 + arm.lr + 0.1 * seed + (0.001 * seed if arm.variant else 0)
        return {
            "settings": arm.settings(),
            "seed": seed,
            **dict.fromkeys(("base_loss", "initial_loss"), 3.0),
            **dict.fromkeys(("final_loss", "validation_loss", "bits_per_byte"), loss),
            "curve": [(0, 3.0), (arm.steps, loss)],
            **dict.fromkeys(("trainable", "added"), 1),
            **dict.fromkeys(("seconds_per_step", "tokens_per_second"), 0.1),
        }

    monkeypatch.setattr(study_training, "run", run)
    return done
