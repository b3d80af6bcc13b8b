"""Makes the Auto classes of transformers know every family as soon as they are imported, without importing a family.

Only the installed package registers itself; copies of the modelling files on the Hub do not.
"""

import functools
import importlib
from collections.abc import Iterator
from typing import Any

import transformers

from .after_import import after_import
from .modeling.model_types import PREFIX, known_model_types


# What makes the inputs of a model: in each module, the names of its classes by model type.
PREPARATION = {
    "tokenization_auto": "TOKENIZER_MAPPING_NAMES",
    "processing_auto": "PROCESSOR_MAPPING_NAMES",
    "image_processing_auto": "IMAGE_PROCESSOR_MAPPING_NAMES",
    "video_processing_auto": "VIDEO_PROCESSOR_MAPPING_NAMES",
    "feature_extraction_auto": "FEATURE_EXTRACTOR_MAPPING_NAMES",
}


def register() -> None:
    """Registers all supported families with the Auto classes, and guards saving, now or when these are imported."""
    after_import("transformers.models.auto.configuration_auto", _register_configurations)
    for module, names in PREPARATION.items():
        after_import(f"transformers.models.auto.{module}", functools.partial(_prepare, module, names))
    after_import(f"{__package__}.modeling.configuration_kromhc", _register_models_of_new_classes)
    after_import(f"{__package__}.modeling.modeling_kromhc", _guard_saving)


class _OnDemand(dict[str, Any]):
    """The configuration classes that are registered with AutoConfig; ours are imported when somebody asks for one."""

    OURS = object()

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if value is not self.OURS:
            return value
        return importlib.import_module(".modeling.configuration_kromhc", __package__).KromHCConfig

    def get(self, key: str, default: Any = None) -> Any:
        value = super().get(key, default)
        return self[key] if value is self.OURS else value

    # Without this one, dict(...) would copy what is inside.
    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    def values(self) -> Any:
        return [self[key] for key in self]

    def items(self) -> Any:
        return [(key, self[key]) for key in self]

    def __reduce__(self) -> Any:
        return dict, (dict(self.items()),)


def _register_configurations() -> None:
    mapping: Any = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    # Not AutoConfig.register: it needs the class, and the class needs the family's module.
    classes = _OnDemand(mapping._extra_content)
    classes.update({PREFIX + model_type: _OnDemand.OURS for model_type in known_model_types()})
    mapping._extra_content = classes


def _prepare(module: str, names: str) -> None:
    classes = getattr(importlib.import_module(f"transformers.models.auto.{module}"), names)
    for model_type in known_model_types():
        if model_type in classes:
            classes[PREFIX + model_type] = classes[model_type]


def _register_models_of_new_classes() -> None:
    config: Any = importlib.import_module(".modeling.configuration_kromhc", __package__)
    config.KromHCConfig.on_new_class.append(_register_models)


def _register_models(config_type: Any) -> None:
    modeling: Any = importlib.import_module(".modeling.modeling_kromhc", __package__)
    for face in modeling.FACES:
        backbone = face.backbone_for(config_type)
        if backbone is not None:
            cls = modeling.model_class(backbone, config_type)
            face.auto_class.register(config_type, cls, exist_ok=True)
            # By the name in config.json vLLM, SGLang, TRL and `transformers serve` look for it in the module. While it
            # is imported, transformers makes the module twice, and a tool may hold either; the class is the same.
            setattr(type(transformers), cls.__name__, cls)


def _guard_saving() -> None:
    importlib.import_module(".whole_models", __package__).guard_saving()
