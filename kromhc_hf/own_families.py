"""Families whose code is not in transformers: a row for one, written by whoever knows its layers."""

from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .modeling.configuration_kromhc import KromHCConfig
from .modeling.host import forget_model_type
from .modeling.layer_spec import Row
from .modeling.model_types import PREFIX
from .modeling.outside_families import REGISTERED, checked_family, register, withdraw


def register_family(model_type: str, row: Row, *, layer_class: type | str | None = None) -> None:
    """Says what the decoder layers of a model look like whose code is not in transformers, so that it is supported.

    The row is written in the words of `kromhc_hf.rows`. It holds in this process, so a package that brings a model
    along calls this where it registers the model with the Auto classes. A saved model carries its row and the code of
    its family along, if that is flat files that import each other as `from .x import y`, and loads elsewhere with
    `trust_remote_code=True`. Another row for the same model type takes the place of the first one.

    Args:
        model_type: as the configuration of the model says.
        row: one specification, several for layers of several kinds, or a choice by configuration.
        layer_class: the class of the decoder layers, or its name; others are then refused.

    Raises:
        ValueError: if the table of families has the model type already, or the row is none.
    """
    register(checked_family(model_type, row, layer_class))
    # Where the code of the base comes from the installed package, so does that of a saved model; any other is loaded
    # from the folder, and only for those who trust it.
    if model_type in CONFIG_MAPPING:
        face: Any = KromHCConfig
        CONFIG_MAPPING.register(PREFIX + model_type, face, exist_ok=True)


def unregister_family(model_type: str) -> None:
    """Undoes `register_family`; models that have hyper-connections already keep them.

    Raises:
        ValueError: if there is no such row.
    """
    if model_type not in REGISTERED:
        known = ", ".join(sorted(REGISTERED)) or "there is none"
        raise ValueError(f"model_type must be one that was registered ({known}); got {model_type!r}.")
    withdraw(model_type)
    forget_model_type(PREFIX + model_type)
