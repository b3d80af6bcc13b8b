"""A study as data: what its arms are, read from a YAML file and checked as a whole before anything runs."""

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

import yaml

from benchmarks.study.statistics import MOST_SEEDS
from kromhc_hf.modeling.options import OPTIONS, StreamOptions, with_option_fields
from kromhc_hf.modeling.stream_ends import READOUTS
from kromhc_hf.modeling.variants import VARIANTS


TRAINED = ("all", "hyper_connections", "lora", "lora_and_hyper_connections")
SYMMETRY_BREAKING = ("peaked_reads", "unequal_writes")
# Unequal writes keep the mean of the streams only where the columns of h_res sum to 1 exactly.
EXACTLY_DOUBLY_STOCHASTIC = tuple(name for name, kind in VARIANTS.items() if kind.doubly_stochastic == "exactly")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]*")


class StudyError(ValueError):
    """Something about a study that its user can put right; the message has the rule, the value and the way out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
@with_option_fields
class Arm:
    """One way to train, the same for all seeds. Paths are relative to the shared folder.

    Args:
        model: folder of a checkpoint; its own tokenizer is used.
        backbone: instead of `model`, fields of a LlamaConfig to train from scratch, its weights random by seed.
        tokenizer: folder of the tokenizer that goes with `backbone`.
        text: a text file; its last tenth is held out, unless `held_out_text` names another file for that.
        length: tokens per window.
        batch: windows per step.
        steps: optimizer steps.
        eval_every: steps between two evaluations on the held-out windows.
        held_out_windows: how many windows are evaluated, spread evenly over the held-out text.
        lr: peak learning rate of what is trained in the backbone: its weights, or LoRA's.
        lr_ratio: the hyper-connections train at `lr_ratio * lr`, also when they train alone.
        weight_decay: for the matrices of the backbone.
        trained: "all", "hyper_connections", "lora" (no streams), or "lora_and_hyper_connections"; the last three keep
            the weights of the base frozen.
        lora_rank: rank of LoRA on all linear layers; alpha is twice the rank.
        variant: parametrisation of h_res; None is the plain model without streams.
        symmetry_breaking: what tells the streams apart at the identity init: "peaked_reads" is the package's own
            (h_pre uneven, h_post = 1), "unequal_writes" has h_pre = 1/n and h_post from .5 to 1.5 with mean 1.
        against: the arm that this one is compared with, if not the study's reference.
        equal_time: shorten the training to the time that the arm it is compared with takes, by the measured costs.

    The other fields are the options of `apply_hyper_connections`, see `StreamOptions`.
    """

    model: str | None = None
    backbone: dict | None = None
    tokenizer: str | None = None
    text: str = "text/tinyshakespeare/input.txt"
    held_out_text: str | None = None
    length: int = 128
    batch: int = 8
    steps: int = 250
    eval_every: int = 50
    held_out_windows: int = 64
    lr: float = 1e-3
    lr_ratio: float = 1.0
    weight_decay: float = 0.0
    trained: str = "all"
    lora_rank: int | None = None
    variant: str | None = None
    symmetry_breaking: str = "peaked_reads"
    against: str | None = None
    equal_time: bool = False

    def stream_options(self) -> StreamOptions:
        """The options of its hyper-connections.

        Raises:
            ValueError: if one of them has a value that is not allowed.
        """
        return StreamOptions(**{name: getattr(self, name) for name in OPTIONS})

    def settings(self) -> dict[str, Any]:
        """What the result of a run depends on, beside the seed."""
        return {key: value for key, value in vars(self).items() if key not in ("against", "equal_time")}


@dataclasses.dataclass(frozen=True)
class Study:
    """Arms by name, the seeds that all of them run with, and the name of the arm that the others are compared with."""

    title: str
    seeds: list[int]
    reference: str
    arms: dict[str, Arm]
    curves: list[str]

    def compared_with(self, name: str) -> str:
        return self.arms[name].against or self.reference


def load_study(path: Path, shared: Path) -> Study:
    """Reads a study and checks all of it.

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
    _refuse_unknown("study", raw, keys)
    arms = raw.get("arms")
    if not isinstance(arms, dict) or not arms:
        raise StudyError(f"arms must be a mapping from names to settings; got {arms!r}. See benchmarks/studies.")
    defaults = raw.get("defaults") or {}
    for name, values in (("defaults", defaults), *arms.items()):
        if not isinstance(values, (dict, type(None))):
            raise StudyError(f"{name!r} must be a mapping from keys to values; got {values!r}.")
    made = {str(name): _make_arm(str(name), defaults | (own or {})) for name, own in arms.items()}
    study = Study(
        title=str(raw.get("title", path.stem)),
        seeds=_seeds(raw.get("seeds")),
        reference=str(raw.get("reference")),
        arms=made,
        curves=list(map(str, raw.get("curves") or made)),
    )
    for name in (study.reference, *study.curves, *map(study.compared_with, made)):
        if name not in made:
            raise StudyError(
                f"reference, against and curves must name arms of the study; got {name!r}. The arms are "
                f"{', '.join(made)}."
            )
    for name, arm in made.items():
        _check_files(name, arm, shared)
    return study


def _make_arm(name: str, values: dict[str, Any]) -> Arm:
    if not NAME.fullmatch(name):
        raise StudyError(f"the name of an arm must be letters, digits, blanks and . _ + -; got {name!r}. Rename it.")
    # Options that read their value say themselves what is wrong with it.
    reading = {key: object for key, option in OPTIONS.items() if option.read}
    hints = typing.get_type_hints(Arm) | reading
    _refuse_unknown(f"arm {name!r}", values, set(hints))
    for key, value in values.items():
        if hints[key] is float and isinstance(value, int) and not isinstance(value, bool):
            values[key] = value = float(value)
        if not isinstance(value, hints[key]) or (isinstance(value, bool) and hints[key] is not bool):
            kind = getattr(hints[key], "__name__", str(hints[key]))
            hint = " YAML wants a point in such a number: 3.0e-4." if hints[key] is float else ""
            raise StudyError(f"arm {name!r}: {key} must be of type {kind}; got {value!r}.{hint}")
    arm = Arm(**values)
    try:
        _check(arm)
    except ValueError as error:
        raise StudyError(f"arm {name!r}: {error}") from error
    return arm


def _check(arm: Arm) -> None:
    """Refuses values that cannot be trained, and those that would be ignored in silence."""
    for key in ("length", "batch", "steps", "eval_every", "held_out_windows", "lr", "lr_ratio"):
        if getattr(arm, key) <= 0:
            raise ValueError(f"{key} must be positive; got {getattr(arm, key)}. The default is {getattr(Arm(), key)}.")
    for key, allowed in (("trained", TRAINED), ("symmetry_breaking", SYMMETRY_BREAKING)):
        if getattr(arm, key) not in allowed:
            raise ValueError(f"{key} must be one of {', '.join(allowed)}; got {getattr(arm, key)!r}.")
    if (arm.model is None) == (arm.backbone is None) or (arm.backbone is None) != (arm.tokenizer is None):
        raise ValueError(
            f"model must be a checkpoint, or backbone and tokenizer must say what to train from scratch; got model="
            f"{arm.model!r}, backbone={arm.backbone!r}, tokenizer={arm.tokenizer!r}. Give one or the other."
        )
    if (arm.lora_rank is None) == ("lora" in arm.trained) or (arm.lora_rank or 1) < 1:
        raise ValueError(f"lora_rank must be given with LoRA, at least 1; got {arm.lora_rank} and {arm.trained!r}.")
    wanted = arm.trained in ("hyper_connections", "lora_and_hyper_connections")
    if arm.trained != "all" and wanted != (arm.variant is not None):
        raise ValueError(f"trained={arm.trained!r} must {'' if wanted else 'not '}have a variant; got {arm.variant!r}.")
    if arm.variant is None:
        return
    arm.stream_options()
    learned_ends = arm.stream_embedding or READOUTS[arm.readout].module is not None
    if arm.trained == "lora_and_hyper_connections" and learned_ends:
        raise ValueError(
            "readout must not be learned beside LoRA, without stream_embedding: PEFT's modules_to_save holds the "
            f"hyper-connections alone; got {arm.readout!r}."
        )
    if arm.symmetry_breaking == "unequal_writes":
        if arm.variant not in EXACTLY_DOUBLY_STOCHASTIC or arm.init != "identity":
            raise ValueError(
                f"symmetry_breaking 'unequal_writes' must have init 'identity' and an exactly doubly stochastic "
                f"variant ({', '.join(EXACTLY_DOUBLY_STOCHASTIC)}); got {arm.init!r} and {arm.variant!r}. "
                "Use peaked_reads."
            )


def _check_files(name: str, arm: Arm, shared: Path) -> None:
    for key in ("model", "tokenizer", "text", "held_out_text"):
        value = getattr(arm, key)
        if value is not None and not (shared / value).exists():
            raise StudyError(
                f"arm {name!r}: {key} must be in the shared folder; {shared / value} is not there. "
                "Use --shared FOLDER, or set KROMHC_SHARED."
            )


def _seeds(value: Any) -> list[int]:
    seeds = list(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value
    whole = isinstance(seeds, list) and all(isinstance(seed, int) for seed in seeds)
    if not whole or not 1 <= len(set(seeds)) == len(seeds) <= MOST_SEEDS:
        raise StudyError(f"seeds must be a number from 1 to {MOST_SEEDS}, or that many different ones; got {value!r}.")
    return seeds


def _refuse_unknown(owner: str, values: dict[str, Any], known: set[str]) -> None:
    unknown = set(values) - known
    if unknown:
        raise StudyError(
            f"{owner} must have known keys alone; got {', '.join(sorted(map(str, unknown)))}. "
            f"The keys are {', '.join(sorted(known))}."
        )
