"""Makes PEFT know hyper-connections as soon as it is imported, without importing it for those who do not use it."""

import importlib

from .after_import import after_import
from .modeling.model_types import PREFIX, known_model_types


def register_with_peft() -> None:
    """Registers the PEFT method and the default targets of every family, now or when `peft` is imported."""
    after_import("peft", _register)


def _register() -> None:
    # Adapter files name their method, so it must be known before the first of them is read.
    importlib.import_module(".peft.tuner", __package__).register_method()
    mirror_default_targets()


def mirror_default_targets() -> None:
    """Gives `kromhc_<family>` PEFT's default target modules of the family, for every method."""
    constants = vars(importlib.import_module("peft.utils.constants"))
    for name, by_model_type in constants.items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(by_model_type, dict):
            for model_type in known_model_types():
                if model_type in by_model_type:
                    by_model_type.setdefault(PREFIX + model_type, by_model_type[model_type])
