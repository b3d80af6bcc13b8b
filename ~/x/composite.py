# Code of kromhc-hf, which travels with every model that it saves.
"""Models of several modalities: the text model inside, which gets the hyper-connections, and the models around it."""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from .layer_spec import attribute


def models_to_text_model(model: Any, path: str) -> list[Any]:
    """The transformers models from the outermost inwards to the text model, which comes last.

    The text model is known by its configuration, the very object that `get_text_config()` of the whole returns.

    Args:
        model: the whole.
        path: from the text model to its decoder layers.

    Raises:
        ValueError: if there is no such model inside.
    """
    text = model.config.get_text_config()
    models = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    found = [name for name, part in models.items() if part.config is text and attribute(part, path) is not None]
    if not found:
        raise ValueError(
            f"{type(model).__name__} must have a text model of model type {text.model_type!r} inside that shares the "
            f"configuration of get_text_config() and has its decoder layers at {path!r}; there is none. Put back the "
            "text model that was made with it, or save the model and load it again."
        )
    # A causal language model may be in between; the innermost one is meant.
    name = max(found, key=len)
    return [part for place, part in models.items() if not place or f"{name}.".startswith(f"{place}.")]


def text_model_of(model: Any) -> Any:
    """What turns token ids alone into hidden states or logits: the outermost text model inside, or the model itself."""
    text = model.config.get_text_config()
    parts = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    return model if text is model.config else next(part for part in parts if part.config is text)


def replace_config(model: Any, config: Any) -> None:
    """Puts `config` and its parts wherever a model and its modules hold those of the present one, which they share."""
    new = {id(old): replacement for old, replacement in _paired(model.config, config)}
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if id(value) in new:
                setattr(module, name, new[id(value)])


def _paired(present: Any, config: Any) -> list[tuple[Any, Any]]:
    """The parts of two configurations that stand for each other, and the configurations themselves."""
    pairs = [(present, config)]
    for name, value in vars(present).items():
        replacement = vars(config).get(name)
        if isinstance(value, PreTrainedConfig) and isinstance(replacement, PreTrainedConfig):
            pairs += _paired(value, replacement)
    return pairs
