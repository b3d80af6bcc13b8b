"""DeepSpeed ZeRO on two gloo ranks, through the Trainer: the losses of the base, fp32, groups and checkpoints.

Needs DeepSpeed, which `make deepspeed` installs into an environment of its own.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed: run make deepspeed")

# The loss is near 4.6, where fp32 has a spacing of 5e-7.
TOLERANCE = 1e-6
GROUPS = {"backbone": 23, "backbone_without_decay": 7, "hyper_connections": 18}
# Each run and the one of the base that it must start like.
BASES = {
    "folder_2": "base_2",
    "folder_3": "base_3",
    "applied_3": "base_3",
    "without_init_3": "base_3",
    "autocast_2": "autocast_base_3",
    "autocast_3": "autocast_base_3",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """The folder where the ranks have left what they measured, one file per run."""
    folder, tests = tmp_path_factory.mktemp("deepspeed"), Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    worker = [tests / "support" / "deepspeed_worker.py", folder]
    run = subprocess.run([*command, *worker], env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-4000:]
    return folder


def measured(results: Path, name: str) -> dict:
    return json.loads((results / f"{name}.json").read_text())


@pytest.mark.parametrize("name", BASES)
def test_training_starts_as_the_base_and_stays_whole(results, name):
    result, base = measured(results, name), measured(results, BASES[name])
    assert result["losses"][0] == pytest.approx(base["losses"][0], abs=TOLERANCE)
    assert result["groups"] == GROUPS
    assert result["rates"] == pytest.approx([1e-3, 1e-3, 3e-2])
    assert result["dtypes"] == ["torch.float32"]
    assert result["moved"] > 0
    assert result["saved_error"] == 0
    assert result["resumed"] == result["losses"]


@pytest.mark.parametrize("name", ["bfloat16_folder_3", "bfloat16_applied_3"])
def test_partitions_in_bfloat16_are_refused(results, name):
    assert "torch_autocast" in measured(results, name)["refused"]
