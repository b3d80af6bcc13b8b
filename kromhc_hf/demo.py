"""What the package is for, on a tiny model that comes with it: converted, trained beside its base, undone, shown."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from .applying import remove_hyper_connections
from .conversion.convert import convert_checkpoint
from .demo_page import Curve, DemoReport, write_demo_page
from .inspection.plots import require_matplotlib
from .inspection.recording import BranchRecord, record_mappings
from .training import optimizer_param_groups


DATA = Path(__file__).parent / "demo_data"
MODEL = DATA / "gpt2-tinystories-1M"
TEXT = DATA / "tinyshakespeare.txt"
HELD_OUT_SHARE = 0.1
CONTEXT, BATCH, EVALUATIONS = 128, 8, 6
LEARNING_RATE, HYPER_CONNECTION_LEARNING_RATE = 3e-4, 1e-2
PROMPT = "Once upon a time"


def run_demo(directory: Path, *, steps: int, console: Console) -> DemoReport:
    """Converts the embedded model to four streams, trains it and its base on the embedded text, and undoes it.

    Args:
        directory: folder for `converted/`, `fine-tuned/` and `demo.html`; must not exist or be empty.
        steps: optimiser steps of 8 x 128 tokens.
        console: where progress is shown.

    Raises:
        FileExistsError: if the folder is not empty.
        ValueError: if matplotlib is not installed.
    """
    require_matplotlib()
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"output must be a new or empty folder; {directory} is not empty. Remove it first.")
    converted, tuned, page = directory / "converted", directory / "fine-tuned", directory / "demo.html"
    with console.status("converting to four streams, and comparing with the base"):
        report = convert_checkpoint(MODEL, converted, num_streams=4, verify=True)
    tokenizer = AutoTokenizer.from_pretrained(converted)
    # fp32, since updates of a small learning rate would vanish in bf16 weights.
    base, model = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (MODEL, converted))
    undone = _undone_is_base(converted)
    train, held_out = _windows(tokenizer)
    text_before, before = _continue(model, tokenizer), _record(model, held_out)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:

        def fine_tune(trained: Any, name: str) -> Curve:
            bar = progress.add_task(name, total=steps)
            return _fine_tune(trained, train, held_out, steps, lambda: progress.advance(bar))

        plain, streams = fine_tune(base, "training without streams"), fine_tune(model, "the same with four streams")
    text_after = _continue(model, tokenizer)
    model.save_pretrained(tuned)
    tokenizer.save_pretrained(tuned)
    reloaded = AutoModelForCausalLM.from_pretrained(tuned)
    found = DemoReport(
        report, plain, streams, _loss(reloaded, held_out), undone, text_before, text_after, page, converted, tuned
    )
    write_demo_page(page, found, before, _record(reloaded, held_out), asdict(report))
    return found


def _undone_is_base(converted: Path) -> bool:
    """Whether a converted model without its hyper-connections is the base: its class, every tensor, every name."""
    base, model = (AutoModelForCausalLM.from_pretrained(path) for path in (MODEL, converted))
    model = remove_hyper_connections(model)
    tensors, expected = model.state_dict(), base.state_dict()
    same = tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in expected)
    return type(model) is type(base) and same


def _windows(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Training and held-out windows of the embedded text, `[N, 128]` each; the held-out part is the end of it."""
    text = TEXT.read_text(encoding="utf-8")
    cut = int(len(text) * (1 - HELD_OUT_SHARE))
    parts = (torch.tensor(tokenizer(part, verbose=False)["input_ids"]) for part in (text[:cut], text[cut:]))
    train, held_out = (part[: len(part) // CONTEXT * CONTEXT].view(-1, CONTEXT) for part in parts)
    return train, held_out[:: max(1, len(held_out) // 64)]


@torch.no_grad()
def _loss(model: Any, windows: Tensor) -> float:
    model.eval()
    losses = [model(rows, labels=rows).loss * len(rows) for rows in windows.split(2 * BATCH)]
    return (sum(losses) / len(windows)).item()


@torch.no_grad()
def _record(model: Any, windows: Tensor) -> dict[str, BranchRecord]:
    with record_mappings(model.eval()) as records:
        model(windows[:1])
    return records


def _continue(model: Any, tokenizer: Any) -> str:
    prompt = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.eval().generate(**prompt, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def _fine_tune(model: Any, windows: Tensor, held_out: Tensor, steps: int, advance: Callable[[], None]) -> Curve:
    """Trains on batches that are the same for every model."""
    curve = Curve([0], [_loss(model, held_out)])
    evaluated = {round(steps * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)}
    optimizer, batches = _optimizer(model), _batches(windows)
    for step in range(1, steps + 1):
        rows = next(batches)
        model.train()(rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        advance()
        if step in evaluated:
            curve.steps.append(step)
            curve.losses.append(_loss(model, held_out))
    return curve


def _batches(windows: Tensor) -> Iterator[Tensor]:
    order = torch.Generator().manual_seed(0)
    while True:
        yield windows[torch.randint(len(windows), (BATCH,), generator=order)]


def _optimizer(model: Any) -> torch.optim.Optimizer:
    if not hasattr(model.config, "hc_num_streams"):
        return torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0)
    return torch.optim.AdamW(optimizer_param_groups(model, LEARNING_RATE, HYPER_CONNECTION_LEARNING_RATE))
