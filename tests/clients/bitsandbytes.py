"""bitsandbytes: weights of eight and four bits, through transformers."""

from pathlib import Path
from typing import Any

from clients.client import Check, Client, Models, same
from clients.torchao import total


def loaded(models: Models, work: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    import kromhc_hf  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(models.start, quantization_config=BitsAndBytesConfig(**options))
    model.save_pretrained(work / "saved")
    return {"loaded": total(model), "saved and loaded": total(AutoModelForCausalLM.from_pretrained(work / "saved"))}


def eight(models: Models, work: Path) -> Any:
    return loaded(models, work, load_in_8bit=True)


def four(models: Models, work: Path) -> Any:
    return loaded(models, work, load_in_4bit=True)


CLIENT = Client(
    tool="bitsandbytes",
    requirements=("bitsandbytes==0.50.2", "accelerate"),
    use="`import kromhc_hf`, then `from_pretrained(MODEL, quantization_config=BitsAndBytesConfig(load_in_8bit=True))`.",
    checks=(
        Check("sum of the logits with 8-bit weights", eight, same),
        Check("sum of the logits with 4-bit weights", four, same),
    ),
)
