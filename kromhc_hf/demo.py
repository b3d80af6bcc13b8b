"""The whole way on a tiny model that comes with the package: convert, verify, generate, fine-tune, save, reload."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from .conversion.convert import convert_checkpoint
from .conversion.report import ConversionReport
from .inspection.plots import plot_mixing, require_matplotlib
from .inspection.recording import record_mappings
from .training import optimizer_param_groups


DATA = Path(__file__).parent / "demo_data"
MODEL = DATA / "gpt2-tinystories-1M"
TEXT = DATA / "tinyshakespeare.txt"
HELD_OUT_SHARE = 0.1
CONTEXT, BATCH = 128, 8
LEARNING_RATE, HYPER_CONNECTION_LEARNING_RATE = 1e-3, 3e-3
PROMPT = "Once upon a time"


@dataclass(frozen=True)
class DemoReport:
    """What the demo measured: losses in nats per token on held-out text, and where its results are."""

    conversion: ConversionReport
    loss_before: float
    loss_after: float
    loss_reloaded: float
    text_before: str
    text_after: str
    picture: Path
    model: Path


def run_demo(directory: Path, *, steps: int, console: Console) -> DemoReport:
    """Converts the embedded model to four streams, fine-tunes it on the embedded text and saves it.

    Args:
        directory: folder for `converted/`, `fine-tuned/` and `mixing.png`; must not exist or be empty.
        steps: optimiser steps of 8 x 128 tokens.
        console: where progress is shown.

    Raises:
        FileExistsError: if the folder is not empty.
        ValueError: if matplotlib is not installed.
    """
    require_matplotlib()
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"output must be a new or empty folder; {directory} is not empty. Remove it first.")
    converted, tuned, picture = directory / "converted", directory / "fine-tuned", directory / "mixing.png"
    with console.status("converting and verifying"):
        report = convert_checkpoint(MODEL, converted, num_streams=4, verify=True)
    tokenizer = AutoTokenizer.from_pretrained(converted)
    # fp32, since updates of a small learning rate would vanish in bf16 weights.
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    train, held_out = _windows(tokenizer)
    text_before, loss_before = _continue(model, tokenizer), _loss(model, held_out)
    _fine_tune(model, train, steps, console)
    text_after, loss_after = _continue(model, tokenizer), _loss(model, held_out)
    model.save_pretrained(tuned)
    tokenizer.save_pretrained(tuned)
    reloaded = AutoModelForCausalLM.from_pretrained(tuned)
    with record_mappings(reloaded) as records, torch.no_grad():
        reloaded(held_out[:1])
    plot_mixing(records, picture)
    return DemoReport(
        report, loss_before, loss_after, _loss(reloaded, held_out), text_before, text_after, picture, tuned
    )


def _windows(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Training and held-out windows of the embedded text, `[N, 128]` each; the held-out part is the end of it."""
    text = TEXT.read_text(encoding="utf-8")
    cut = int(len(text) * (1 - HELD_OUT_SHARE))
    parts = (torch.tensor(tokenizer(part, verbose=False)["input_ids"]) for part in (text[:cut], text[cut:]))
    train, held_out = (part[: len(part) // CONTEXT * CONTEXT].view(-1, CONTEXT) for part in parts)
    return train, held_out


@torch.no_grad()
def _loss(model: Any, windows: Tensor) -> float:
    model.eval()
    losses = [model(rows, labels=rows).loss * len(rows) for rows in windows.split(BATCH)]
    return (sum(losses) / len(windows)).item()


def _continue(model: Any, tokenizer: Any) -> str:
    prompt = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.eval().generate(**prompt, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def _fine_tune(model: Any, windows: Tensor, steps: int, console: Console) -> None:
    optimizer = torch.optim.AdamW(optimizer_param_groups(model, LEARNING_RATE, HYPER_CONNECTION_LEARNING_RATE))
    order = torch.Generator().manual_seed(0)
    model.train()
    columns = (TextColumn("fine-tuning"), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=steps)
        for _ in range(steps):
            rows = windows[torch.randint(len(windows), (BATCH,), generator=order)]
            loss = model(rows, labels=rows).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress.update(bar, advance=1, description=f"loss {loss.item():.3f}")
