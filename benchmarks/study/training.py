"""One run of a study: an arm trained with a seed, and what came of it."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.study.config import Arm
from benchmarks.study.data import Corpus, batches, load_corpus
from benchmarks.study.models import adapted_model, make_optimizer, parameter_counts, plain_model


WARMUP_SHARE, FINAL_LR_SHARE, GRADIENT_NORM = 0.03, 0.1, 1.0
# Relative to the loss of the base: streams that are not bitwise equal are averaged, a few hundred eps of rounding.
START_TOLERANCE = 3e-5
EVALUATION_BATCH = 16
REPORT_EVERY = 5

Report = Callable[[int, float], None]


class Training:
    """An arm about to be trained with one seed: fp32, AdamW, warm-up and cosine, gradients clipped.

    Attributes:
        base_loss: held-out loss of the model before it got streams or adapters, in nats per token.
        initial_loss: the same with them.

    Raises:
        RuntimeError: if a retrofit does not start at the loss of its base.
    """

    def __init__(self, arm: Arm, seed: int, corpus: Corpus, shared: Path):
        torch.manual_seed(seed)
        model = plain_model(arm, shared)
        self.corpus = corpus
        self.base_loss = held_out_loss(model, corpus.held_out)
        self.model = adapted_model(arm, model).train()
        self.initial_loss = held_out_loss(self.model, corpus.held_out)
        lossless = arm.backbone is None and arm.init == "identity"
        if lossless and abs(self.initial_loss - self.base_loss) > START_TOLERANCE * self.base_loss:
            raise RuntimeError(
                f"a retrofit must start at the loss of its base, {self.base_loss:.7f}; got {self.initial_loss:.7f}."
            )
        self.optimizer = make_optimizer(arm, self.model)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: learning_rate(step, arm.steps))
        self.batches: Iterator[Tensor] = batches(corpus.train, arm.length, arm.batch, seed)

    def step(self) -> float:
        """Trains on the next batch and returns its loss in nats per token."""
        rows = next(self.batches)
        loss = self.model(rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return loss.item()


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak: up over the first 3 % of the steps, then half a cosine down to 10 %."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def held_out_loss(model: Any, windows: Tensor) -> float:
    """Mean loss in nats per predicted token over windows `[W, L]`; leaves the model in the mode that it was in."""
    was_training = model.training
    model.eval()
    parts = windows.split(EVALUATION_BATCH)
    total = sum(model(rows, labels=rows).loss.item() * len(rows) for rows in parts)
    model.train(was_training)
    return total / len(windows)


def run(arm: Arm, seed: int, shared: Path, cache: Path, report: Report = lambda step, loss: None) -> dict[str, Any]:
    """Trains an arm with a seed on one thread.

    Returns:
        Losses on the held-out windows in nats per token (`curve`: pairs of step and loss) and in bits per byte at the
        end, the training loss per evaluation interval, parameter counts, and CPU seconds per training step.
    """
    torch.set_num_threads(1)
    corpus = load_corpus(arm, shared, cache)
    training = Training(arm, seed, corpus, shared)
    curve, training_curve, recent, seconds = [(0, training.initial_loss)], [], [], 0.0
    for step in range(1, arm.steps + 1):
        start = time.process_time()
        recent.append(training.step())
        seconds += time.process_time() - start
        if step % arm.eval_every == 0 or step == arm.steps:
            curve.append((step, held_out_loss(training.model, corpus.held_out)))
            training_curve.append((step, sum(recent) / len(recent)))
            recent.clear()
        if step % REPORT_EVERY == 0 or step == arm.steps:
            report(step, training_curve[-1][1] if not recent else recent[-1])
    final = curve[-1][1]
    predicted_tokens = corpus.held_out[:, 1:].numel()
    return {
        "settings": arm.settings(),
        "seed": seed,
        "base_loss": training.base_loss,
        "initial_loss": training.initial_loss,
        "final_loss": final,
        "bits_per_byte": final * predicted_tokens / math.log(2) / corpus.held_out_bytes,
        "curve": curve,
        "training_curve": training_curve,
        **parameter_counts(arm, training.model),
        "seconds_per_step": seconds / arm.steps,
    }
