"""A study as data: its arms, read from a YAML file and checked as a whole before anything runs."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from .arm import PLAIN_TOKENIZERS, Arm, StudyError, make_arm, refuse_unknown
from .controls import as_wide_as
from .models import size
from .statistics import MOST_SEEDS


@dataclasses.dataclass(frozen=True)
class Study:
    """Arms by name, the seeds that all of them run with, and the name of the arm that the others are compared with.

    `tuning_seed` is the one that learning rates are chosen with, and none of `seeds`.
    """

    title: str
    seeds: list[int]
    reference: str
    arms: dict[str, Arm]
    curves: list[str]
    tuning_seed: int

    def compared_with(self, name: str) -> str:
        return self.arms[name].against or self.reference


def file_name(arm: str) -> str:
    """An arm's name in those of its files."""
    return arm.replace(" ", "_")


def load_study(path: Path, shared: Path, changes: Mapping[str, Any] = MappingProxyType({})) -> Study:
    """Reads a study and checks all of it.

    Args:
        path: the YAML file.
        shared: folder that the paths in it start from.
        changes: settings for all arms, instead of those in the file.

    Raises:
        StudyError: for a file that cannot be read, an unknown key, arm or variant, a value that is not allowed, and a
            folder or text that is not there.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise StudyError(f"the study must be a readable YAML file; got {path}: {error}") from error
    if not isinstance(raw, dict):
        raise StudyError(f"the study must be a mapping with seeds, reference and arms; got {path}.")
    keys = {"title", "seeds", "reference", "defaults", "arms", "curves"}
    refuse_unknown("study", raw, keys)
    arms = raw.get("arms")
    if not isinstance(arms, dict) or not arms:
        raise StudyError(f"arms must be a mapping from names to settings; got {arms!r}. See benchmarks/studies.")
    defaults = raw.get("defaults") or {}
    for name, values in (("defaults", defaults), *arms.items()):
        if not isinstance(values, (dict, type(None))):
            raise StudyError(f"{name!r} must be a mapping from keys to values; got {values!r}.")
    made = {str(name): make_arm(str(name), defaults | (own or {}) | dict(changes)) for name, own in arms.items()}
    seeds = _seeds(raw.get("seeds"))
    study = Study(
        title=str(raw.get("title", path.stem)),
        seeds=seeds,
        reference=str(raw.get("reference")),
        arms=made,
        curves=list(map(str, raw.get("curves") or made)),
        # The learning rates of published studies were chosen so; with another seed they could be others.
        tuning_seed=max(seeds) + 1,
    )
    wider_as = [arm.wider_as for arm in made.values() if arm.wider_as is not None]
    for name in (study.reference, *study.curves, *map(study.compared_with, made), *wider_as):
        if name not in made:
            raise StudyError(
                f"reference, against, wider_as and curves must name arms of the study; got {name!r}. The arms are "
                f"{', '.join(made)}."
            )
    for name, arm in made.items():
        _check_files(name, arm, shared)
    for name, arm in made.items():
        _check_compared(name, arm, study)
    for name, arm in made.items():
        if arm.wider_as is not None:
            study.arms[name] = as_wide_as(arm, made[arm.wider_as], lambda it: size(it, shared))
    return study


def rehearsal(study: Study) -> Study:
    """The study with a hundredth of its steps, one window in each, one seed and few held-out windows."""
    arms = {
        name: dataclasses.replace(arm, steps=max(2, arm.steps // 100), batch=1, held_out_windows=2)
        for name, arm in study.arms.items()
    }
    return dataclasses.replace(study, seeds=study.seeds[:1], arms=arms)


def _check_files(name: str, arm: Arm, shared: Path) -> None:
    for key in ("model", "tokenizer", "text", "held_out_text"):
        value = getattr(arm, key)
        plain = key == "tokenizer" and value in PLAIN_TOKENIZERS
        if value is not None and not plain and not (shared / value).exists():
            raise StudyError(
                f"arm {name!r}: {key} must be in the shared folder; {shared / value} is not there. "
                "Use --shared FOLDER, or set KROMHC_SHARED."
            )


def _check_compared(name: str, arm: Arm, study: Study) -> None:
    """Refuses an arm that is made after one that is itself made after another."""
    other = study.compared_with(name)
    cut = study.arms[other].equal_time and study.compared_with(other) != other
    if arm.equal_time and other != name and (cut or study.arms[other].convert_at):
        raise StudyError(
            f"arm {name!r}: equal_time must be against an arm whose steps all cost the same and are not cut "
            f"themselves; got {other!r}. Name another in against."
        )
    wide = None if arm.wider_as is None else study.arms[arm.wider_as]
    if wide is not None and (wide.backbone is None or wide.wider_as is not None):
        raise StudyError(
            f"arm {name!r}: wider_as must name an arm from scratch that is not made wider itself; got {arm.wider_as!r}."
        )
    if twin := next(
        (twin for twin in study.arms if twin != name and file_name(twin).lower() == file_name(name).lower()), None
    ):
        raise StudyError(f"arms must have names that differ as those of files; got {name!r} and {twin!r}. Rename one.")


def _seeds(value: Any) -> list[int]:
    seeds = list(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value
    whole = isinstance(seeds, list) and all(isinstance(seed, int) for seed in seeds)
    if not whole or not 1 <= len(set(seeds)) == len(seeds) <= MOST_SEEDS:
        raise StudyError(f"seeds must be a number from 1 to {MOST_SEEDS}, or that many different ones; got {value!r}.")
    return seeds
