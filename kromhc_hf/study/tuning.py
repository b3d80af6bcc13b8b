"""The learning rate of each arm, chosen from its grid with one seed before the seeds of the study run."""

import dataclasses
import math
from pathlib import Path

from .arm import Arm, StudyError
from .runs import execute, results
from .study_file import Study


def tuned(study: Study, folder: Path, shared: Path, workers: int, device: str) -> Study:
    """The study with the learning rates that had the lowest validation loss; what is trained for that stays in folder.

    The seed is none of the study's, so that no arm is reported on the run that it was chosen by. What is in the folder
    already is not trained again.

    Raises:
        StudyError: if no learning rate of an arm has a loss that is a number.
    """
    tries: dict[str, dict[str, Arm]] = {}
    for name, arm in study.arms.items():
        tries[name] = {
            f"{name} at lr {rate}": dataclasses.replace(arm, lr=rate, lr_grid=None) for rate in arm.lr_grid or ()
        }
    arms = {key: arm for some in tries.values() for key, arm in some.items()}
    grid = dataclasses.replace(study, seeds=[study.tuning_seed], reference="", arms=arms, curves=[])
    if not grid.arms:
        return study
    execute(grid, folder, shared, workers, device)
    runs = results(grid, folder, shared)
    losses = {name: by_seed[study.tuning_seed]["validation_loss"] for name, by_seed in runs.items()}
    arms = dict(study.arms)
    for name, some in tries.items():
        finite = [key for key in some if math.isfinite(losses[key])]
        if some and not finite:
            raise StudyError(f"arm {name!r}: training diverged at every learning rate of its grid. Try smaller ones.")
        if finite:
            arms[name] = dataclasses.replace(study.arms[name], lr=some[min(finite, key=lambda key: losses[key])].lr)
    return dataclasses.replace(study, arms=arms)


def at_the_edge(lr: float, grid: list[float]) -> bool:
    """Whether a learning rate is the smallest or largest of its grid, so that a better one may be outside."""
    return len(grid) > 1 and lr in (min(grid), max(grid))
