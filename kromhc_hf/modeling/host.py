# Code of kromhc-hf, which travels with every model that it saves.
"""What the files that travel lean on inside transformers, where it is private or differs between releases."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY


def config_class_of(model_type: str) -> Any:
    """The configuration class of a model type, imported on first use."""
    return CONFIG_MAPPING[model_type]


def config_class_name(model_type: str) -> str:
    """The name of that class, without importing it."""
    return CONFIG_MAPPING_NAMES[model_type]


def class_for_task(auto_class: Any, config_type: Any) -> Any:
    """The model class that an Auto class stands for with a configuration class, None if there is none.

    None too where it is the class of the text model alone, which is made from a part of the configuration.
    """
    found = auto_class._model_mapping.get(config_type, None)
    parts = {part for part in config_type.sub_configs.values() if part is not config_type}
    return None if getattr(found, "config_class", None) in parts else found


def class_names_for_task(auto_class: Any, model_type: str) -> tuple[str, ...]:
    """The names of the classes that an Auto class knows for a model type, without importing them."""
    names = auto_class._model_mapping._model_mapping.get(model_type, ())
    return (names,) if isinstance(names, str) else tuple(names)


@contextmanager
def known_to(auto_class: Any, config_type: Any, model_type: Any) -> Iterator[None]:
    """Lets an Auto class make models of `model_type`, if there is one, from `config_type` inside the block alone."""
    mapping = auto_class._model_mapping
    if model_type is None or config_type in mapping:
        yield
        return
    mapping.register(config_type, model_type, exist_ok=True)
    try:
        yield
    finally:
        mapping._extra_content.pop(config_type, None)


def mirror_weight_conversion(key: str, new_key: str) -> None:
    """Gives a class name or model type the conversion of checkpoint tensors that another one has, if it has one."""
    conversion = get_checkpoint_conversion_mapping(key)
    if conversion is not None:
        register_checkpoint_conversion_mapping(new_key, conversion, overwrite=True)


def record_outputs_of(model: Any) -> None:
    """Has hidden states and attentions recorded for the class that a model has now.

    The registry is keyed by class: after a change of class recorded outputs would vanish in silence.
    """
    _CAN_RECORD_REGISTRY[model] = model._can_record_outputs


def keep_last_weights(folder: Path) -> None:
    """Removes what a save over other weights leaves and a loader would take: the one file, or the index of shards."""
    paths = [folder / name for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)]
    if all(path.is_file() for path in paths):
        with suppress(FileNotFoundError):  # another process was faster
            min(paths, key=lambda path: path.stat().st_mtime_ns).unlink()
