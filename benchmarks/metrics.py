"""What StreamMetricsCallback costs at its default, as a share of a training step.

python -m benchmarks.metrics

Trains the model that comes with the package for a few steps and samples every other one, so that sampled and plain
steps alternate in one run. The cost of a sampled step, spread over the default interval, is compared with a plain step.
"""

import json
import statistics
import tempfile
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from kromhc_hf import StreamMetricsCallback, apply_hyper_connections
from kromhc_hf.demo import MODEL, TEXT


class Stopwatch(TrainerCallback):
    """Seconds of every step, without what callbacks do before it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = torch.tensor(tokenizer(TEXT.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    rows = [{"input_ids": row, "labels": row} for row in ids[: 400 * 128].view(-1, 128)]
    model = apply_hyper_connections(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32))
    stopwatch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder, max_steps=42, per_device_train_batch_size=8, report_to=[], save_strategy="no", use_cpu=True
        )
        Trainer(model, options, train_dataset=rows, callbacks=[StreamMetricsCallback(every=2), stopwatch]).train()
    # The first step is sampled; the first two warm up.
    sampled, plain = statistics.median(stopwatch.seconds[2::2]), statistics.median(stopwatch.seconds[3::2])
    every = StreamMetricsCallback().every
    print(json.dumps({"plain step": plain, "sampled step": sampled, "every": every}))
    print(f"cost at the default, every {every} steps: {(sampled - plain) / every / plain:.2%} of a step")


if __name__ == "__main__":
    main()
