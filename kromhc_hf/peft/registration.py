"""Makes PEFT know hyper-connections as soon as it is imported, without importing it for those who do not use it."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ..modeling.configuration_kromhc import PREFIX
from ..modeling.layer_fit import known_model_types


def register_with_peft() -> None:
    """Registers the PEFT method and the default targets of every family, now or when `peft` is imported."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterPeft())


def _register() -> None:
    # Adapter files name their method, so it must be known before the first of them is read.
    importlib.import_module(".tuner", __package__).register_method()
    mirror_default_targets()


def mirror_default_targets() -> None:
    """Gives `kromhc_<family>` PEFT's default target modules of the family, for every method."""
    constants = vars(importlib.import_module("peft.utils.constants"))
    for name, by_model_type in constants.items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(by_model_type, dict):
            for model_type in known_model_types():
                if model_type in by_model_type:
                    by_model_type.setdefault(PREFIX + model_type, by_model_type[model_type])


class _AfterPeft(MetaPathFinder):
    """Finds `peft` where it is, and adds the registration to the end of its import."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "peft":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            exec_module = spec.loader.exec_module

            def exec_and_register(module: ModuleType) -> None:
                exec_module(module)
                sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _AfterPeft)]
                _register()

            loader: Any = spec.loader
            loader.exec_module = exec_and_register
        return spec
