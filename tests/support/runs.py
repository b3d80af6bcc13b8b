"""Short Trainer runs on random tokens."""

from pathlib import Path
from typing import Any

import torch
from support.tiny import configurations, make_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from kromhc_hf import apply_hyper_connections


# What the Trainer of a release calls it.
CHECKPOINTING = (
    f"{'activation' if hasattr(TrainingArguments, 'activation_checkpointing') else 'gradient'}_checkpointing"
)


class Tokens(Dataset):
    """Random sequences of one length, the same for the same index."""

    def __init__(self, vocab_size: int = 99, length: int = 12, size: int = 64):
        generator = torch.Generator().manual_seed(5)
        self.ids = torch.randint(3, vocab_size, (size, length), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def retrofitted(model_type: str = "llama", **options: Any):
    """A tiny model with hyper-connections at the identity init."""
    return apply_hyper_connections(make_model(configurations(model_type)[0]), **options)


def make_trainer(folder: Path, model: Any, callbacks: Any = (), kind: type = Trainer, **options: Any):
    defaults = {
        "output_dir": str(folder),
        "max_steps": 6,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    arguments = TrainingArguments(**{**defaults, **options})
    return kind(model=model, args=arguments, train_dataset=Tokens(), callbacks=list(callbacks))


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
