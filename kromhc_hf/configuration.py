"""KromHCConfig by the path that transformers users expect; it is written in `modeling/configuration_kromhc.py`."""

from typing import Any

from .modeling import configuration_kromhc
from .modeling.configuration_kromhc import KromHCConfig


__all__ = ["KromHCConfig"]


def __getattr__(name: str) -> Any:
    # Generated classes, such as KromHCLlamaConfig, are made when somebody asks for them.
    return getattr(configuration_kromhc, name)
