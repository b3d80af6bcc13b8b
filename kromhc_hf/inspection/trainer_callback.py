"""StreamMetricsCallback: what the streams do while a Trainer trains, in the Trainer's own log."""

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from ..training import hyper_connection_parameters
from .recording import BranchRecord, branches, record_mappings
from .statistics import Statistic, stream_statistics, with_totals


class StreamMetricsCallback(TrainerCallback):
    """Logs what the streams do, with the Trainer's own log: `Trainer(..., callbacks=[StreamMetricsCallback()])`.

    On every k-th optimizer step it records the mappings and computes, for every branch and in total, all that
    `stream_statistics` computes, such as the off-identity mass and the composite gain over depth of h_res and the
    spread of the streams, and the gradient norm of the hyper-connections after clipping. The latest sample goes into
    the next log entry under `hc/<name>` and `hc/<branch>/<name>`. Training itself is not changed: the same losses with
    and without. A compiled model runs its sampled steps eagerly.

    Args:
        every: sample the first step and then every `every` optimizer steps.
        max_tokens: how many tokens of the first sequence of a batch are looked at.
        per_branch: whether to log the branches too or the totals alone.

    Raises:
        ValueError: for `every` or `max_tokens` below 1; from `on_train_begin` for a model without hyper-connections.
    """

    def __init__(self, every: int = 100, max_tokens: int = 256, per_branch: bool = True):
        for name, value in (("every", every), ("max_tokens", max_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}. Use the default of StreamMetricsCallback().")
        self.every, self.max_tokens, self.per_branch = every, max_tokens, per_branch
        self.latest: dict[str, float] = {}
        self._recording: Any = None
        self._records: dict[str, BranchRecord] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        hyper_connection_parameters(kwargs["model"])
        self._close()
        _move_to_front(self)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close()
        if state.global_step % self.every == 0:
            self._recording = record_mappings(kwargs["model"], max_tokens=self.max_tokens)
            self._records = self._recording.__enter__()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._recording is None:
            return
        statistics = stream_statistics(self._records) | gradient_norms(kwargs["model"])
        self.latest = {f"hc/{name}": v for name, v in statistics.items() if self.per_branch or "/" not in name}
        self._close()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is not None and self.latest:
            logs.update(self.latest)
            # The entry of the history was copied from `logs` before the callbacks are called.
            state.log_history[-1].update(self.latest)
            self.latest = {}

    def _close(self) -> None:
        if self._recording is not None:
            self._recording.__exit__(None, None, None)
        self._recording = None
        self._records = {}


def _gradient_norm(module: nn.Module) -> float:
    gradients: list[Any] = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    norms: list[Tensor] = [torch.linalg.vector_norm(gradient.float()) for gradient in gradients]
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    return torch.stack(whole).norm().item() if whole else 0.0


# Not one of STATISTICS, since it is computed of a live module after its backward pass and not of a record.
GRADIENT_NORM = Statistic[nn.Module](
    name="gradient_norm",
    label="gradient norm of the hyper-connections",
    of_branch=_gradient_norm,
    of_model=lambda values: sum(value**2 for value in values) ** 0.5,
)


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """The gradient norm of the hyper-connections: `gradient_norm` of all, `<branch>/gradient_norm` of each.

    Sharded gradients are gathered, so with FSDP2 call it on every rank.
    """
    return with_totals([GRADIENT_NORM], branches(model))


def _move_to_front(callback: TrainerCallback) -> None:
    """Puts the callback before the reporters of its Trainer, since what it adds to `logs` is seen by later ones alone.

    A Trainer puts its reporters first and hands callbacks no reference to itself or to the handler that calls them, so
    the handler is taken from the calling frame. Called without a Trainer there is nothing to move.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler):
            handler.callbacks.remove(callback)
            handler.callbacks.insert(0, callback)
            return
        frame = frame.f_back
