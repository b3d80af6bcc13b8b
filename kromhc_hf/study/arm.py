"""One arm of a study: everything that its result depends on, checked."""

import dataclasses
import re
import typing
from typing import Any

import torch

from ..modeling.options import OPTIONS, StreamOptions, with_option_fields
from ..modeling.stream_ends import READOUTS
from ..modeling.variants import VARIANTS


TRAINED = ("all", "hyper_connections", "lora", "lora_and_hyper_connections")
SYMMETRY_BREAKING = ("peaked_reads", "unequal_writes")
OPTIMIZERS = ("adamw", "muon")
# Not folders, but ways to make tokens of a text that need none.
PLAIN_TOKENIZERS = ("bytes", "characters")
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
        backbone: instead of `model`, fields of a configuration to train from scratch, its weights random by seed;
            `model_type` says of which, "llama" if it is not there.
        tokenizer: folder of the tokenizer that goes with `backbone`, or "bytes" or "characters".
        text: a text file; its last tenth is held out, unless `held_out_text` names another file for that.
        held_out_share: the share of `text` that is held out, at its end.
        validation_share: the share of `text` before that; learning rates are chosen on it. With 0 they are chosen on
            the held-out windows themselves.
        length: tokens per window.
        batch: windows per step.
        steps: optimizer steps.
        eval_every: steps between two evaluations on the held-out windows.
        held_out_windows: how many windows are evaluated, spread evenly over the held-out text.
        lr: peak learning rate of what is trained in the backbone: its weights, or LoRA's.
        lr_grid: learning rates to choose `lr` from, each tried with one seed that is none of the study's.
        lr_ratio: the hyper-connections train at `lr_ratio * lr`, also when they train alone.
        hyper_connection_lr: instead of `lr_ratio`, their learning rate itself, which the grid leaves alone.
        weight_decay: for the matrices of the backbone.
        optimizer: "adamw", or "muon" for the matrices between embedding and head, and AdamW for everything else.
        betas: of AdamW.
        hyper_connection_betas: of AdamW for the hyper-connections, if not the same.
        warmup: share of the steps over which the learning rate rises.
        final_lr: share of the peak at which the cosine ends.
        trained: "all", "hyper_connections", "lora" (no streams), or "lora_and_hyper_connections"; the last three keep
            the weights of the base frozen.
        lora_rank: rank of LoRA on all linear layers; alpha is twice the rank.
        variant: parametrisation of h_res; None is the plain model without streams.
        branch_scale: of the plain model, a factor on what every residual branch adds: the control that tells the size
            of writes from what several streams do.
        learned_branch_scale: whether these factors are trained, one per branch, as hyper-connections are.
        wider_as: of the plain model from scratch, an arm whose number of parameters it gets in a wider MLP.
        convert_at: share of the steps after which a plain model gets its streams; its init must be the identity.
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
    held_out_share: float = 0.1
    validation_share: float = 0.0
    length: int = 128
    batch: int = 8
    steps: int = 250
    eval_every: int = 50
    held_out_windows: int = 64
    lr: float = 1e-3
    lr_grid: list | None = None
    lr_ratio: float = 1.0
    hyper_connection_lr: float | None = None
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    betas: list = dataclasses.field(default_factory=lambda: [0.9, 0.95])
    hyper_connection_betas: list | None = None
    warmup: float = 0.03
    final_lr: float = 0.1
    trained: str = "all"
    lora_rank: int | None = None
    variant: str | None = None
    branch_scale: float | None = None
    learned_branch_scale: bool = False
    wider_as: str | None = None
    convert_at: float = 0.0
    symmetry_breaking: str = "peaked_reads"
    against: str | None = None
    equal_time: bool = False

    if typing.TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def stream_options(self) -> StreamOptions:
        """The options of its hyper-connections.

        Raises:
            ValueError: if one of them has a value that is not allowed.
        """
        return StreamOptions(**{name: getattr(self, name) for name in OPTIONS})

    def settings(self) -> dict[str, Any]:
        """What the result of a run depends on, beside the seed."""
        return {key: value for key, value in vars(self).items() if key not in ("against", "equal_time")}


def make_arm(name: str, values: dict[str, Any]) -> Arm:
    """An arm from what its user wrote.

    Raises:
        StudyError: for a key that there is not, and a value that is not allowed.
    """
    if not NAME.fullmatch(name):
        raise StudyError(f"the name of an arm must be letters, digits, blanks and . _ + -; got {name!r}. Rename it.")
    # Options that read their value say themselves what is wrong with it.
    reading = {key: object for key, option in OPTIONS.items() if option.read}
    hints = typing.get_type_hints(Arm) | reading
    refuse_unknown(f"arm {name!r}", values, set(hints))
    for key, value in values.items():
        if float in (hints[key], *typing.get_args(hints[key])) and type(value) is int:
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


def refuse_unknown(owner: str, values: dict[str, Any], known: set[str]) -> None:
    unknown = set(values) - known
    if unknown:
        raise StudyError(
            f"{owner} must have known keys alone; got {', '.join(sorted(map(str, unknown)))}. "
            f"The keys are {', '.join(sorted(known))}."
        )


def _check(arm: Arm) -> None:
    """Refuses values that cannot be trained, and those that would be ignored in silence."""
    _check_numbers(arm)
    choices = (("trained", TRAINED), ("symmetry_breaking", SYMMETRY_BREAKING), ("optimizer", OPTIMIZERS))
    for key, allowed in choices:
        if getattr(arm, key) not in allowed:
            raise ValueError(f"{key} must be one of {', '.join(allowed)}; got {getattr(arm, key)!r}.")
    if arm.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise ValueError(f"optimizer 'muon' must have torch 2.9 or newer; got {torch.__version__}. Use adamw.")
    if (arm.model is None) == (arm.backbone is None) or (arm.backbone is None) != (arm.tokenizer is None):
        raise ValueError(
            f"model must be a checkpoint, or backbone and tokenizer must say what to train from scratch; got model="
            f"{arm.model!r}, backbone={arm.backbone!r}, tokenizer={arm.tokenizer!r}. Give one or the other."
        )
    if (arm.lora_rank is None) == ("lora" in arm.trained) or (arm.lora_rank or 1) < 1:
        raise ValueError(f"lora_rank must be given with LoRA, at least 1; got {arm.lora_rank} and {arm.trained!r}.")
    if arm.held_out_text is not None and arm.validation_share:
        raise ValueError("validation_share must be 0 beside held_out_text, which all of the text trains for.")
    wanted = arm.trained in ("hyper_connections", "lora_and_hyper_connections")
    if arm.trained != "all" and wanted != (arm.variant is not None):
        raise ValueError(f"trained={arm.trained!r} must {'' if wanted else 'not '}have a variant; got {arm.variant!r}.")
    _check_controls(arm)
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


def _check_numbers(arm: Arm) -> None:
    for key in ("length", "batch", "steps", "eval_every", "held_out_windows", "lr", "lr_ratio", "held_out_share"):
        if not 0 < getattr(arm, key) < float("inf"):
            raise ValueError(f"{key} must be positive; got {getattr(arm, key)}. The default is {getattr(Arm(), key)}.")
    if arm.hyper_connection_lr is not None and not 0 < arm.hyper_connection_lr < float("inf"):
        raise ValueError(f"hyper_connection_lr must be positive; got {arm.hyper_connection_lr}. Use for example 1e-2.")
    if not 0 <= arm.weight_decay < float("inf"):
        raise ValueError(f"weight_decay must not be negative; got {arm.weight_decay}. The default is 0.")
    for key in ("validation_share", "warmup", "final_lr", "convert_at"):
        if not 0 <= getattr(arm, key) < 1:
            raise ValueError(f"{key} must be a share from 0 to less than 1; got {getattr(arm, key)}.")
    if arm.held_out_share + arm.validation_share >= 1:
        raise ValueError("held_out_share and validation_share must leave some of the text to train on.")
    for key in ("betas", "hyper_connection_betas", "lr_grid"):
        value, top = getattr(arm, key), float("inf") if key == "lr_grid" else 1
        numbers = [] if value is None else value
        if not all(isinstance(number, float) and 0 < number < top for number in numbers):
            raise ValueError(f"{key} must be numbers above 0{' and below 1' * (top == 1)}; got {value!r}.")
        if (key != "lr_grid" and len(numbers) not in (0, 2)) or value == []:
            raise ValueError(f"{key} must be {'at least one' if key == 'lr_grid' else 'two'}; got {value!r}.")


def _check_controls(arm: Arm) -> None:
    for key in ("branch_scale", "wider_as"):
        if getattr(arm, key) is not None and (arm.variant is not None or arm.trained != "all"):
            raise ValueError(f"{key} is for a plain model of which all is trained; got variant {arm.variant!r}.")
    if arm.learned_branch_scale and arm.branch_scale is None:
        raise ValueError("learned_branch_scale must have a branch_scale to start from. Use branch_scale: 1.0.")
    if arm.wider_as is not None and arm.backbone is None:
        raise ValueError("wider_as must have a backbone: a pretrained model cannot be made wider. Use another control.")
    if arm.convert_at and arm.equal_time:
        raise ValueError("equal_time must not go with convert_at, whose steps do not all cost the same. Leave one out.")
    if arm.convert_at and not 0 < round(arm.convert_at * arm.steps) < arm.steps:
        raise ValueError(
            f"convert_at must leave steps before and after the conversion; got {arm.convert_at} of {arm.steps} steps."
        )
    if arm.convert_at and (arm.variant is None or arm.init != "identity" or arm.trained != "all"):
        raise ValueError(
            "convert_at must have a variant with init 'identity', which leaves the trained model as it is, and "
            f"trained: all; got {arm.variant!r}, {arm.init!r} and {arm.trained!r}."
        )
