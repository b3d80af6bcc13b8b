"""The commands that docs/performance.md names run to their end, here on sizes that take a moment."""

import importlib
import sys

import pytest
import torch

from benchmarks.measuring import FASTEST


TINY_LLAMA = "--hidden-size 64 --layers 2 --vocabulary 50 --sequence 16"


@pytest.mark.parametrize(
    ("name", "options", "rows"),
    [
        ("memory", f"{TINY_LLAMA} --blocks layer 2", ["no streams", "none", "layer (1)", "2 (2)"]),
        (
            "training_step",
            f"{TINY_LLAMA} --variants kromhc --stream-layers all 1:2 --trained",
            ["no streams", "kromhc", "kromhc, layers 1:2"],
        ),
        ("hyper_connection", "--hidden-size 32 --tokens 32 --streams 2 --no-compile", ["2"]),
        ("roofline", "--hidden-size 32 --tokens 32 --streams 2 --no-compile", ["2"]),
        ("scaling", "--hidden-sizes 32 --tokens 32 --streams 2", ["2"]),
        ("traffic", "--hidden-size 32 --tokens 32 --streams 2 --no-compile", ["2"]),
    ],
)
def test_a_benchmark_runs_to_its_end(name, options, rows, monkeypatch, capsys):
    threads = torch.get_num_threads()
    rounds = [] if name == "traffic" else ["--rounds", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options.split(), *rounds])
    try:
        importlib.import_module(f"benchmarks.{name}").main()
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    # Of several rounds the table has two different sums.
    assert (FASTEST in lines) == (name != "traffic")
    first_cells = {line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")}
    assert first_cells >= set(rows)
