"""What travels with a saved model: flat files that import torch, transformers and one another, and nothing else."""

from typing import Any

from . import modeling_kromhc
from .modeling_kromhc import (
    KromHCForCausalLM,
    KromHCForQuestionAnswering,
    KromHCForSequenceClassification,
    KromHCForTokenClassification,
    KromHCModel,
)


__all__ = [
    "KromHCForCausalLM",
    "KromHCForQuestionAnswering",
    "KromHCForSequenceClassification",
    "KromHCForTokenClassification",
    "KromHCModel",
]


def __getattr__(name: str) -> Any:
    # Generated classes, such as KromHCLlamaForCausalLM, are made when somebody asks for them.
    return getattr(modeling_kromhc, name)
