"""Measures candidates in turn in one run, and writes what was found as a table, as JSON and as a picture."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kromhc_hf import HyperConnection
from kromhc_hf.study import timing


# The plainest eager style, written from the papers' equations, is the batched twin among the tests.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from support import reference


eager_kromhc = reference.eager_kromhc
ratio = timing.ratio
# Printed above what `in_turn` and `ratio` gave.
FASTEST = (
    "ms and tokens/s are those of the fastest round, ratios medians over the rounds of the ratio within each: columns "
    "do not divide into each other."
)
TRAINED = "give the hyper-connections random weights: at their init all streams are equal, which costs less"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def arguments(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=defaults.get("rounds", 15))
    parser.add_argument("--cpu-time", action="store_true", help="count CPU time, for a busy machine; with --threads 1")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--plot", type=Path, help="where to write the picture")
    return parser


def in_turn(candidates: Mapping[str, Callable[[], Any]], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every candidate in every round. All run once in each round, so that they see the same machine."""
    return timing.in_turn(candidates, options.rounds, options.cpu_time)


def saved_bytes(run: Callable[[], Any], besides: Sequence[torch.Tensor]) -> int:
    """What autograd keeps for the backward pass of `run`, each storage once, without the storages of `besides`."""
    known = {tensor.untyped_storage().data_ptr() for tensor in besides}
    saved: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        alive.append(storage)  # an address must not be given out twice
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(saved.values())


def as_trained(model: Any) -> None:
    """Gives the hyper-connections of a model weights that tell the streams apart."""
    for module in model.modules():
        if isinstance(module, HyperConnection) and module.weight is not None:
            torch.nn.init.normal_(module.weight, std=0.02)


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """The most memory that `run` has allocated at a time, above what was there before."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    present = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        present += event.nbytes()
        peak = max(peak, present)
    return peak


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "command": " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "device": timing.device_name(options.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "clock": "CPU time" if options.cpu_time else "wall",
    }


def report(rows: list[dict[str, Any]], options: argparse.Namespace, note: str | None = None) -> None:
    """Prints the rows as a table under a note on how to read it, and writes them as JSON if asked."""
    about = machine(options)
    described = ", ".join(f"{key}: {value}" for key, value in about.items())
    print("\n" + "\n\n".join([described, note] if note else [described]) + "\n")
    columns = list(rows[0])
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        cells = (f"{row[c]:.3g}" if isinstance(row[c], float) else str(row[c]) for c in columns)
        print("| " + " | ".join(cells) + " |")
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=2) + "\n")


def bars(rows: list[dict[str, Any]], label: Callable[[dict[str, Any]], str], value: str, path: Path) -> None:
    """Draws one number per row as a horizontal bar."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.35 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh([label(row) for row in rows][::-1], [row[value] for row in rows][::-1])
    axes.bar_label(drawn, fmt=" %.3g")
    axes.margins(x=0.15, y=0.02)
    axes.set_xlabel(value)
    figure.savefig(path, dpi=120)
