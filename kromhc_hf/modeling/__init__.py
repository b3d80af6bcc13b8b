"""What travels with a saved model: flat files that import torch, transformers and one another, and nothing else."""

from importlib import import_module
from typing import Any


__all__ = [
    "KromHCForCausalLM",
    "KromHCForImageTextToText",
    "KromHCForMultimodalLM",
    "KromHCForQuestionAnswering",
    "KromHCForSequenceClassification",
    "KromHCForTokenClassification",
    "KromHCModel",
]


def __getattr__(name: str) -> Any:
    # The classes for the tasks, and generated ones such as KromHCLlamaForCausalLM, which are made when asked for.
    if not name.startswith("KromHC"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".modeling_kromhc", __name__), name)
