"""What travels with a saved model: flat files that import torch, transformers and one another, and nothing else."""

from typing import Any

from . import modeling_kromhc
from .modeling_kromhc import FACES


__all__ = [face.__name__ for face in FACES]


def __getattr__(name: str) -> Any:
    # The classes for the tasks, and generated ones such as KromHCLlamaForCausalLM, which are made when asked for.
    return getattr(modeling_kromhc, name)
