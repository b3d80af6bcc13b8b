"""Liger: which modules its kernels are put into, by the Trainer. They run on a GPU alone."""

import contextlib
from pathlib import Path
from typing import Any

from clients.client import Check, Client, Models, same


def patched(models: Models, work: Path) -> Any:
    """Every module with a forward of Liger's, and what modules of the family Liger has replaced for later models."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    import kromhc_hf  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(models.start)
    rows = [{"input_ids": list(range(12)), "labels": list(range(12))}] * 4
    arguments = TrainingArguments(str(work), use_liger_kernel=True, use_cpu=True, report_to="none", max_steps=1)
    # The Trainer patches where training starts, and the first of the kernels stops it where there is no GPU.
    with contextlib.suppress(RuntimeError):
        Trainer(model, arguments, train_dataset=rows).train()
    forwards = {name: vars(module).get("forward") for name, module in model.named_modules()}
    found = [name or "the model" for name, forward in forwards.items() if "liger" in getattr(forward, "__module__", "")]
    assert len(found) > 1, f"Liger patches {found}"
    return sorted(found)


def agree(base: Any, converted: Any) -> str:
    same(base, converted)
    return f"the {len(base)} modules that are patched in the base, among them {', '.join(base[:3])}; no GPU, so not run"


CLIENT = Client(
    tool="Liger",
    requirements=("liger-kernel==0.8.5", "accelerate", "triton"),
    use="`import kromhc_hf`, then `TrainingArguments(use_liger_kernel=True)`.",
    checks=(Check("`TrainingArguments(use_liger_kernel=True)`", patched, agree),),
)
