"""A study of a user's own checkpoint on a text of theirs: every variant beside the controls that decide."""

import dataclasses
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from ..conversion.base import BaseCheckpoint
from ..conversion.stored_model import StoredModel
from ..inspection.plots import require_matplotlib
from ..json_text import finite
from ..modeling.configuration_kromhc import KromHCConfig
from ..modeling.host import class_for_task
from ..modeling.modeling_kromhc import GENERATIVE_FACES
from .arm import Arm, StudyError, make_arm
from .cost import are_measured, measure_costs, read_costs, seconds_left
from .report import draw_curves, draw_differences, summarize
from .runs import changes, execute, refuse_other_device, results, stored, write_atomically
from .statistics import MOST_SEEDS
from .study_file import Study
from .timing import device_name
from .training import refuse_beyond_context
from .tuning import tuned


REFERENCE = "no streams"
# A gain that one of these has as well is not one of mixing streams.
CONTROLS: dict[str, dict[str, Any]] = {
    "learned branch scales": {"branch_scale": 1.0, "learned_branch_scale": True},
    "identity": {"variant": "identity"},
}
COST_ROUNDS = 3
# That of no run that is reported, however many seeds are added later: what was tuned for some stays right for more.
TUNING_SEED = MOST_SEEDS


def comparison(model: str, text: Path, variants: Sequence[str], seeds: int, settings: dict[str, Any]) -> Study:
    """The study that trains a checkpoint further: without streams, with each variant, and with the controls.

    Args:
        model: folder or Hub id of a checkpoint without hyper-connections.
        text: a text file; its last tenth is held out.
        variants: names of parametrisations.
        seeds: how many runs of each, paired by their batches.
        settings: fields of `Arm` for all of them.

    Raises:
        StudyError: for a setting that is not allowed, and for a checkpoint that is no causal language model.
        ValueError: if the checkpoint is an adapter, damaged, or cannot get streams.
        FileNotFoundError: if there is no such checkpoint or text.
    """
    if not 1 <= seeds <= MOST_SEEDS:
        raise StudyError(f"seeds must be from 1 to {MOST_SEEDS}; got {seeds}.")
    if not all(variants):
        raise StudyError(f"variants must be names with commas between; got {', '.join(variants)!r}.")
    folder, config = _causal_model(model)
    if not text.is_file():
        raise FileNotFoundError(f"TEXT must be a text file; got {text}.")
    shared = {"model": str(folder.resolve()), "text": str(text.resolve()), **settings}
    if shared.get("lr_grid"):
        # The windows that are reported must not choose.
        shared = {"validation_share": Arm.held_out_share, **shared}
    wanted: dict[str, dict[str, Any]] = {REFERENCE: {}, **CONTROLS, **{name: {"variant": name} for name in variants}}
    made = {name: make_arm(name, shared | own) for name, own in wanted.items()}
    refuse_beyond_context(made[REFERENCE], config)
    return Study(f"{folder.name} on {text.name}", list(range(seeds)), REFERENCE, made, list(made), TUNING_SEED)


def prepare(study: Study, folder: Path, device: str) -> float:
    """Measures what a step of each arm costs, if that is not known, and says how many seconds all runs will take.

    That is one after the other.
    """
    require_matplotlib()
    _refuse_other(folder)
    _refuse_to_overwrite(study, folder)
    refuse_other_device(results(study, folder, Path()), device)
    if not are_measured(study, folder, device):
        measure_costs(study, folder, Path(), COST_ROUNDS, device)
    return seconds_left(study, folder, Path())


def compare(study: Study, folder: Path, workers: int, device: str) -> dict[str, Any]:
    """Does the runs and writes `summary.json`, `differences.png` and `curves.png` into the folder.

    Returns:
        The summary, see `kromhc_hf.study.report.table`.

    Raises:
        StudyError: if training diverged at every learning rate, or finished runs have another one than is chosen now.
    """
    study = tuned(study, folder, Path(), workers, device)
    _refuse_to_overwrite(study, folder, rates_chosen=True)
    execute(study, folder, Path(), workers, device)
    about = {"device": device, "name": device_name(device), "torch": version("torch")}
    summary = summarize(study, results(study, folder, Path()), read_costs(study, folder), about)
    write_atomically(folder / "summary.json", finite(summary))
    draw_differences(summary, folder / "differences.png")
    draw_curves(summary, study.curves, folder / "curves.png")
    return summary


def _causal_model(model: str) -> tuple[Path, Any]:
    """The folder and the configuration of a checkpoint that continues a text and can be given streams."""
    stored = StoredModel.open(BaseCheckpoint.open(model).folder)
    # Of another task transformers would load it too, with a head that was never trained.
    if stored.face not in GENERATIVE_FACES or class_for_task(AutoModelForCausalLM, type(stored.config)) is None:
        raise StudyError(
            f"model must be a causal language model, of AutoModelForCausalLM; {model} is one of "
            f"{stored.face.auto_class.__name__}."
        )
    dataclasses.replace(stored, config=KromHCConfig(backbone_config=stored.config)).skeleton()
    return stored.folder, stored.config


def _refuse_other(folder: Path) -> None:
    """Refuses a folder that has something else in it, which a run could overwrite."""
    known = {"runs", "tokens", "cost.json", "summary.json", "differences.png", "curves.png"}
    if folder.exists() and (others := {path.name for path in folder.iterdir()} - known):
        raise StudyError(
            f"output must be a new folder, or one of a comparison; {folder} has {sorted(others)[0]} in it."
        )


def _refuse_to_overwrite(study: Study, folder: Path, rates_chosen: bool = False) -> None:
    """Refuses a folder with runs of another comparison, which those of this one would replace."""
    for name, arm in study.arms.items():
        for seed in study.seeds:
            if (run := stored(folder, name, seed)) is None:
                continue
            # Which of several learning rates is taken is found out later.
            known = rates_chosen or arm.lr_grid is None
            if different := changes(run, arm if known else dataclasses.replace(arm, lr=run["settings"]["lr"]), Path()):
                raise StudyError(
                    f"output must be a new folder, or one of the same comparison; {folder} has runs that differ in "
                    f"{', '.join(different)}, and they would be replaced. Use another folder."
                )
