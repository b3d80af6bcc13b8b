"""torchao: int8 weights, through transformers and by its own call."""

from pathlib import Path
from typing import Any

from clients.client import Check, Client, Models, same


def loaded(models: Models, work: Path) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    import kromhc_hf  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(
        models.start, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    )
    model.save_pretrained(work / "saved")
    return {"loaded": total(model), "saved and loaded": total(AutoModelForCausalLM.from_pretrained(work / "saved"))}


def in_place(models: Models, work: Path) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from transformers import AutoModelForCausalLM

    import kromhc_hf  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(models.start)
    quantize_(model, Int8WeightOnlyConfig())
    return total(model)


def total(model: Any) -> float:
    """The sum of the logits of a few tokens, which shows any other bit."""
    import torch

    with torch.no_grad():
        return model(torch.arange(12)[None]).logits.double().sum().item()


CLIENT = Client(
    tool="torchao",
    requirements=("torchao==0.18.0", "accelerate"),
    use="`import kromhc_hf`, then `from_pretrained(MODEL, quantization_config=TorchAoConfig(...))`, or `quantize_` on "
    "the loaded model.",
    checks=(
        Check("sum of the logits, `TorchAoConfig(Int8WeightOnlyConfig())`", loaded, same),
        Check("sum of the logits, `quantize_` in place", in_place, same),
    ),
)
