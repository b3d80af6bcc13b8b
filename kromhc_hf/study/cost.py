"""What a training step of each arm costs, as a multiple of the arm that it is compared with.

The two take their steps in turn in one process, so that both see the same machine, and the ratio is taken within each
round. `equal_time` then gives an arm as many steps as the other's time buys. Its schedule is shortened with it: a loss
read off in the middle of a longer cosine is not annealed and would be unfair to the dearer arm.
"""

import dataclasses
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from .arm import Arm, StudyError
from .data import load_corpus
from .runs import results, write_atomically
from .study_file import Study
from .timing import device_name, in_turn, ratio
from .training import Training


# What a step's cost does not depend on.
IRRELEVANT = (
    *("steps", "eval_every", "held_out_windows", "lr", "lr_grid", "lr_ratio", "hyper_connection_lr", "weight_decay"),
    *("betas", "hyper_connection_betas", "warmup", "final_lr", "held_out_share", "validation_share"),
    *("residual_logit", "symmetry_breaking", "wider_as"),
)


def cost_settings(arm: Arm) -> dict[str, Any]:
    return {key: value for key, value in arm.settings().items() if key not in IRRELEVANT}


def measure_costs(study: Study, folder: Path, shared: Path, rounds: int, device: str = "cpu") -> None:
    """Measures every arm, on a CPU on one thread and in CPU time, and writes `cost.json` into the folder."""
    torch.set_num_threads(1)
    cpu_time = device == "cpu"
    found: list[dict[str, Any]] = []
    for name, arm in study.arms.items():
        other = study.arms[study.compared_with(name)]
        # Their steps do not all cost the same.
        if arm.convert_at or other.convert_at:
            continue
        settings = [cost_settings(arm), cost_settings(other)]
        if settings[0] != settings[1] and not any(entry["settings"] == settings for entry in found):
            print(f"measuring {name}", file=sys.stderr, flush=True)
            steps = {
                key: Training(it, 0, load_corpus(it, shared, folder / "tokens"), shared, device).step
                for key, it in (("arm", arm), ("other", other))
            }
            seconds = in_turn(steps, rounds, cpu_time)
            found.append(
                {
                    "arm": name,
                    "against": study.compared_with(name),
                    "times": ratio(seconds["arm"], seconds["other"]),
                    "seconds_per_step": statistics.median(seconds["arm"]),
                    "other_seconds_per_step": statistics.median(seconds["other"]),
                    "settings": settings,
                }
            )
    about = {"device": device_name(device), "torch": torch.__version__, "clock": "CPU time" if cpu_time else "wall"}
    write_atomically(folder / "cost.json", {"machine": about, "costs": found})


def are_measured(study: Study, folder: Path, device: str) -> bool:
    """Whether `cost.json` has the costs of all arms, and from this machine."""
    path = folder / "cost.json"
    if not path.exists():
        return False
    machine = json.loads(path.read_text(encoding="utf-8"))["machine"]
    here = machine["device"] == device_name(device) and machine["torch"] == torch.__version__
    return here and read_costs(study, folder).keys() == study.arms.keys()


def read_costs(study: Study, folder: Path) -> dict[str, float]:
    """The measured cost of each arm as a multiple of the one that it is compared with; without those not measured."""
    path = folder / "cost.json"
    entries = json.loads(path.read_text(encoding="utf-8"))["costs"] if path.exists() else []
    costs = {}
    for name, arm in study.arms.items():
        settings = [cost_settings(arm), cost_settings(study.arms[study.compared_with(name)])]
        if settings[0] == settings[1]:
            costs[name] = 1.0
        for entry in entries:
            if entry["settings"] == settings:
                costs[name] = entry["times"]
    return costs


def seconds_left(study: Study, folder: Path, shared: Path) -> float:
    """How long the runs of a study that are not there yet will take one after the other, with their evaluations."""
    entries = json.loads((folder / "cost.json").read_text(encoding="utf-8"))["costs"]
    seconds: dict[str, float] = {}
    for entry in entries:
        for name, key in ((entry["arm"], "seconds_per_step"), (entry["against"], "other_seconds_per_step")):
            seconds[name] = entry[key]
    done, total = results(study, folder, shared), 0.0
    for name, arm in study.arms.items():
        # One seed more for each learning rate that is tried.
        left = len(study.seeds) - len(done[name]) + len(arm.lr_grid or ())
        total += left * (arm.steps + _evaluations(arm)) * seconds.get(name, max(seconds.values(), default=0.0))
    return total


def _evaluations(arm: Arm) -> float:
    """The evaluations of a run in training steps, of which a forward pass takes about a third."""
    # Two before the first step, and the one on the validation windows.
    times = 3 + math.ceil(arm.steps / arm.eval_every)
    return times * arm.held_out_windows / arm.batch / 3


def at_equal_time(study: Study, costs: dict[str, float]) -> Study:
    """The study with the arms of equal time cut to the steps that the time of the other arm buys.

    Raises:
        StudyError: if the cost of such an arm has not been measured.
    """
    arms = dict(study.arms)
    for name, arm in study.arms.items():
        if arm.equal_time:
            if name not in costs:
                raise StudyError(
                    f"arm {name!r}: equal_time must have a measured cost, and cost.json has none for these settings. "
                    "Run with --measure-cost first, on a quiet machine."
                )
            steps = study.arms[study.compared_with(name)].steps
            arms[name] = dataclasses.replace(arm, steps=max(1, round(steps / costs[name])))
    return dataclasses.replace(study, arms=arms)
