"""Quanto: weights of eight bits, through transformers and by its own calls."""

from pathlib import Path
from typing import Any

from clients.client import Check, Client, Models, same
from clients.torchao import total


def loaded(models: Models, work: Path) -> Any:
    from transformers import AutoModelForCausalLM, QuantoConfig

    import kromhc_hf  # noqa: F401

    config = QuantoConfig(weights="int8")
    return total(AutoModelForCausalLM.from_pretrained(models.start, quantization_config=config))


def in_place(models: Models, work: Path) -> Any:
    from optimum.quanto import freeze, qint8, quantize
    from transformers import AutoModelForCausalLM

    import kromhc_hf  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(models.start)
    quantize(model, weights=qint8)
    freeze(model)
    return total(model)


CLIENT = Client(
    tool="Quanto",
    requirements=("optimum-quanto==0.2.7", "accelerate"),
    use="`import kromhc_hf`, then `from_pretrained(MODEL, quantization_config=QuantoConfig(weights='int8'))`, or "
    "`quantize` and `freeze` on the loaded model.",
    checks=(
        Check("sum of the logits, `QuantoConfig(weights='int8')`", loaded, same),
        Check("sum of the logits, `quantize` in place", in_place, same),
    ),
)
