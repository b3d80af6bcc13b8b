"""One run of a study: an arm trained with a seed, and what came of it."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..evaluation_mode import evaluation_mode
from .arm import Arm, StudyError
from .data import Corpus, batches, load_corpus
from .models import adapted_model, parameter_counts, plain_model
from .optimizers import learning_rate, make_optimizers
from .timing import synchronize


GRADIENT_NORM = 1.0
# Relative to the loss of the base: streams that are not bitwise equal are averaged, a few hundred eps of rounding.
START_TOLERANCE = 3e-5
EVALUATION_BATCH = 16
REPORT_EVERY = 5

Report = Callable[[int, float], None]


class Training:
    """An arm about to be trained with one seed: warm-up and cosine, gradients clipped, fp32, on a GPU bf16 by autocast.

    Attributes:
        base_loss: held-out loss of the model before it got streams or adapters, in nats per token.
        initial_loss: the same with them.

    Raises:
        RuntimeError: if a retrofit does not start at the loss of its base.
        StudyError: if the windows are longer than the context of the model.
    """

    def __init__(self, arm: Arm, seed: int, corpus: Corpus, shared: Path, device: str = "cpu"):
        torch.manual_seed(seed)
        self.arm, self.corpus, self.device, self.steps_done = arm, corpus, device, 0
        self.model = plain_model(arm, shared).to(device)
        refuse_beyond_context(arm, self.model.config)
        self.base_loss = self.held_out_loss()
        # The backbone trains alone until then.
        self.convert_after = round(arm.convert_at * arm.steps)
        if self.convert_after == 0:
            self.model = adapted_model(arm, self.model)
        self.model.train()
        self.initial_loss = self.held_out_loss()
        control = arm.branch_scale is not None and arm.branch_scale != 1
        if arm.backbone is None and arm.init == "identity" and not control:
            self._check_unchanged(self.base_loss, self.initial_loss)
        self.optimizers = make_optimizers(arm, self.model)
        self.batches: Iterator[Tensor] = batches(corpus.train, arm.length, arm.batch, seed)

    def step(self) -> float:
        """Trains on the next batch and returns its loss in nats per token."""
        rows = next(self.batches).to(self.device)
        with self._autocast():
            loss = self.model(rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        share = learning_rate(self.arm, self.steps_done)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * group.setdefault("peak_lr", group["lr"])
            optimizer.step()
            optimizer.zero_grad()
        self.steps_done += 1
        return loss.item()

    def held_out_loss(self) -> float:
        """Mean loss in nats per predicted token over the held-out windows."""
        return self._loss(self.corpus.held_out)

    def validation_loss(self) -> float:
        """The same over the windows that learning rates are chosen on."""
        return self._loss(self.corpus.validation)

    @torch.no_grad()
    def _loss(self, windows: Tensor) -> float:
        total = 0.0
        with evaluation_mode(self.model), self._autocast():
            for rows in windows.split(EVALUATION_BATCH):
                rows = rows.to(self.device)
                total += self.model(rows, labels=rows).loss.item() * len(rows)
        return total / len(windows)

    def convert_when_due(self) -> None:
        """Gives the model its streams, if that is before the next step; what the optimizers know of the backbone stays.

        Raises:
            RuntimeError: if the loss is not what it was.
        """
        if not self.convert_after or self.steps_done != self.convert_after:
            return
        before = self.held_out_loss()
        known = {parameter: state for optimizer in self.optimizers for parameter, state in optimizer.state.items()}
        self.model = adapted_model(self.arm, self.model).train()
        self._check_unchanged(before, self.held_out_loss())
        self.optimizers = make_optimizers(self.arm, self.model)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter in known:
                        optimizer.state[parameter] = known[parameter]

    def _check_unchanged(self, before: float, after: float) -> None:
        if abs(after - before) > START_TOLERANCE * before:
            raise RuntimeError(f"a retrofit must start at the loss of its base, {before:.7f}; got {after:.7f}.")

    def _autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.device != "cpu")


def refuse_beyond_context(arm: Arm, config: Any) -> None:
    """Refuses windows that are longer than what a model with this configuration can read."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or arm.length
    if arm.length > context:
        raise StudyError(f"length must be at most {context}, the context of the model; got {arm.length}.")


def run(
    arm: Arm,
    seed: int,
    shared: Path,
    cache: Path,
    report: Report = lambda step, loss: None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Trains an arm with a seed, on a CPU on one thread.

    Returns:
        Losses on the held-out windows in nats per token (`curve`: pairs of step and loss) and in bits per byte at the
        end, the loss on the validation windows, the training loss per evaluation interval, parameter counts, and
        seconds per training step (of CPU time on a CPU).
    """
    torch.set_num_threads(1)
    corpus = load_corpus(arm, shared, cache)
    training = Training(arm, seed, corpus, shared, device)
    clock = time.process_time if device == "cpu" else time.perf_counter
    curve, training_curve, recent, seconds = [(0, training.initial_loss)], [], [], 0.0
    for step in range(1, arm.steps + 1):
        training.convert_when_due()
        start = clock()
        recent.append(training.step())
        synchronize()
        seconds += clock() - start
        if step % arm.eval_every == 0 or step == arm.steps:
            curve.append((step, training.held_out_loss()))
            training_curve.append((step, sum(recent) / len(recent)))
            recent.clear()
        if step % REPORT_EVERY == 0 or step == arm.steps:
            report(step, training_curve[-1][1] if not recent else recent[-1])
    final = curve[-1][1]
    predicted_tokens = corpus.held_out[:, 1:].numel()
    return {
        "settings": arm.settings(),
        "seed": seed,
        "device": torch.device(device).type,
        "base_loss": training.base_loss,
        "initial_loss": training.initial_loss,
        "final_loss": final,
        "validation_loss": training.validation_loss(),
        "bits_per_byte": final * predicted_tokens / math.log(2) / corpus.held_out_bytes,
        "curve": curve,
        "training_curve": training_curve,
        **parameter_counts(training.model),
        "seconds_per_step": seconds / arm.steps,
        "tokens_per_second": arm.batch * arm.length * arm.steps / seconds,
    }
