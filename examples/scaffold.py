"""What the examples share: their arguments, the embedded model and text, and the last line with the result."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import kromhc_hf


DATA = Path(kromhc_hf.__file__).parent / "demo_data"
MODEL = DATA / "gpt2-tinystories-1M"
TEXT = DATA / "tinyshakespeare.txt"
INSTRUCTIONS = Path(__file__).parent / "instructions.jsonl"


def own_folder() -> str:
    """Where the result of the running example goes: results of several in one folder could not be loaded."""
    return str(Path("example-output") / Path(sys.argv[0]).stem)


def model_name(name: str) -> str:
    """A model that can be loaded, which is checked before anything is."""
    try:
        AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def text_file(path: str) -> str:
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"must be a text file; got {path}")
    return path


# What only some examples read: each names those that it does.
OPTIONS: dict[str, dict[str, Any]] = {
    "text": {"type": text_file, "default": str(TEXT), "help": "text file to train on"},
    "instructions": {
        "type": text_file,
        "default": str(INSTRUCTIONS),
        "help": "file to train on, a JSON object with prompt and completion in each line",
    },
    "length": {"type": int, "default": 128, "help": "tokens per sequence"},
}


def parse_arguments(
    description: str, *names: str, steps: int, learning_rate: float, trainers: tuple[str, ...] = ()
) -> argparse.Namespace:
    """The command line that all examples have, with the OPTIONS that are named, and a choice of trainers."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=model_name, default=str(MODEL), help="folder or Hub id of the model")
    parser.add_argument("--output", default=own_folder(), help="folder for the result")
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps")
    parser.add_argument("--learning-rate", type=float, default=learning_rate, help="of the backbone")
    parser.add_argument("--num-streams", type=int, default=4, help="residual streams n")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    for name in names:
        parser.add_argument(f"--{name}", **OPTIONS[name])
    if trainers:
        parser.add_argument("--trainer", default=trainers[0], choices=trainers, help="what trains")
    return parser.parse_args()


def load_model(name: str) -> tuple[Any, Any]:
    """A model and its tokenizer, in fp32: small updates would vanish in bf16 weights."""
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)


class Windows(Dataset):
    """A text as non-overlapping windows of tokens; the last tenth is held out."""

    def __init__(self, tokenizer: Any, path: str, length: int, held_out: bool = False):
        ids = torch.tensor(tokenizer(Path(path).read_text(encoding="utf-8"), verbose=False)["input_ids"])
        windows = ids[: len(ids) // length * length].view(-1, length)
        border = len(windows) * 9 // 10
        self.windows = windows[border:][:64] if held_out else windows[:border]
        if len(self.windows) == 0:
            raise ValueError(f"{path} must have at least 10 windows of {length} tokens; got {len(ids)} tokens.")

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = self.windows[index].clone()
        # Nothing predicts the first token, and Trainer divides by the number of labels.
        labels[0] = -100
        return {"input_ids": self.windows[index], "labels": labels}


def training_options(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments for TrainingArguments and its descendants: the published schedule, and ten log entries."""
    return {
        "output_dir": os.path.join(options.output, "checkpoints"),
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, round(0.03 * options.steps)),
        "logging_steps": max(1, options.steps // 10),
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": False,
    }


def training_arguments(options: argparse.Namespace, **more: Any) -> TrainingArguments:
    return TrainingArguments(**training_options(options), **more)


def report(before: float, after: float, output: str) -> None:
    """The last lines of every example."""
    print(f"held-out loss {before:.4f} -> {after:.4f} nats per token")
    print(f"result in {Path(output).resolve()}")
