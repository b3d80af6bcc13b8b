"""Two processes over gloo: loss and gradients are those of one, checkpoints reload, hyper-connections stay in fp32."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


# The loss is near 4.6, where fp32 has a spacing of 5e-7; gradients are below .1.
TOLERANCE = 1e-6
FLOAT32 = ["torch.float32"]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """The folder where the two ranks have left what they measured, one file per mode."""
    folder = tmp_path_factory.mktemp("two_ranks")
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    run = subprocess.run(
        [*command, tests / "support" / "distributed_worker.py", folder],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return folder


def measured(results: Path, mode: str) -> dict:
    return json.loads((results / f"{mode}.json").read_text())


@pytest.mark.parametrize("mode", ["ddp", "frozen_ddp", "fsdp2", "native_fsdp2", "tensor_parallel"])
def test_loss_and_gradients_are_those_of_one_process(results, mode):
    result = measured(results, mode)
    assert result["loss_error"] < TOLERANCE
    assert result["gradient_error"] < TOLERANCE


@pytest.mark.parametrize("mode", ["fsdp2", "native_fsdp2", "tensor_parallel"])
def test_the_model_is_sharded(results, mode):
    assert measured(results, mode)["sharded"] is True


def test_sharded_checkpoints_reload_exactly(results):
    result = measured(results, "fsdp2")
    assert result["resume_error"] == result["reload_error"] == result["saved_error"] == 0
    assert measured(results, "native_fsdp2")["saved_error"] == 0
    assert result["parameter_dtypes"] == result["saved_dtypes"] == FLOAT32


def test_hyper_connections_compute_in_float32(results):
    for mode in ("native_fsdp2", "tensor_parallel"):
        assert measured(results, mode)["dtypes_of_bfloat16"] == FLOAT32
    mixed = measured(results, "fsdp2_bfloat16")
    assert mixed["backbone_dtypes"] == ["torch.bfloat16"]
    assert mixed["dtypes"] == mixed["gradient_dtypes"] == mixed["parameter_dtypes"] == FLOAT32
    # The backbone's matrix products are rounded to 8 bits: a few parts in a thousand of a loss near 4.6.
    assert mixed["loss_error"] < 0.05


def test_blocks_of_streams_go_past_sharded_layers(results):
    result = measured(results, "recomputed_fsdp2")
    assert (result["different"], result["kept"]) == ([], [5, 0])
    assert result["compared"] > 30


def test_metrics_of_a_sharded_model(results):
    result = measured(results, "fsdp2")
    assert result["recorded"] == [[2, 12, 4, 4]] * 6
    assert result["gradient_norm_error"] < TOLERANCE
