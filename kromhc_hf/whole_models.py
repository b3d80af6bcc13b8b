"""Hyper-connections belong to a whole model: in a part of a plain one they would be lost when it is loaded again."""

import functools
import gc
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from .modeling.configuration_kromhc import KromHCConfig
from .modeling.decoder_layer import HyperConnectedLayer
from .modeling.families import COMPOSITE, REFUSED
from .modeling.layer_fit import check_model_type


def check_whole(model: Any) -> None:
    """Refuses a part of another transformers model, whose configuration would not know of the hyper-connections.

    Raises:
        ValueError: naming the model that it is a part of.
    """
    whole = _whole_of(model)
    # Some parts are models that people load by themselves, and whose whole is refused with the call on the part.
    if whole is not None and not (model.config.model_type in COMPOSITE and whole.config.model_type in REFUSED):
        raise ValueError(
            f"model must be a whole model; got the {type(model).__name__} inside a {type(whole).__name__}, which would "
            "be saved with a configuration that knows of no hyper-connections and be loaded without them. "
            f"{_way_out(whole)}"
        )


def check_not_a_part(model: Any, verb: str, call: str) -> None:
    """Refuses to change the streams in a part of a model that would go on believing that it has the former ones.

    Args:
        model: which may be a part of another.
        verb: what is done to the hyper-connections, such as "removed from".
        call: the function that does it.

    Raises:
        ValueError: naming the whole model.
    """
    whole = _whole_of(model)
    if whole is not None and isinstance(whole.config, KromHCConfig):
        raise ValueError(
            f"hyper-connections must be {verb} the whole model; got the {type(model).__name__} inside a "
            f"{type(whole).__name__}. Call {call} on that."
        )


def _whole_of(model: Any) -> Any:
    """The largest transformers model that a base model is a part of; None if there is none."""
    # Looking at every object takes a tenth of a second, and models with a head are hardly ever parts. Those that are
    # get refused when they are saved.
    if model.base_model is not model or not _parents(model):
        return None
    gc.collect()  # some of them may be dead
    return max(_parents(model), key=lambda parent: sum(1 for _ in parent.modules()), default=None)


def _way_out(whole: Any) -> str:
    name = type(whole).__name__
    try:
        check_model_type(whole.config.model_type)
    except ValueError as error:
        return f"They cannot be given to the {name} either: {error}"
    return f"Give them to the {name}: apply_hyper_connections(model) with the whole model."


def _parents(model: Any) -> list[Any]:
    """The transformers models that a model is a part of, which it does not know itself."""
    classes, new = set(), {PreTrainedModel}
    while new:
        classes |= new
        new = {subclass for cls in new for subclass in cls.__subclasses__()} - classes
    # Asking for the type alone is fast and wakes no lazy object. One that failed while it was made has no modules.
    found = [other for other in gc.get_objects() if type(other) in classes and other is not model]
    others = [other for other in found if "_modules" in vars(other)]
    return [other for other in others if any(module is model for module in other.modules())]


def check_saved_whole(model: Any) -> None:
    """Refuses to save a plain model with hyper-connections somewhere inside, which would be lost when it is loaded.

    Raises:
        ValueError: naming the layer.
    """
    if isinstance(model.config, KromHCConfig):
        return
    for path, layer in model.named_modules():
        # Layers with adapters hold the configuration of their plain base, and PEFT saves those.
        if isinstance(layer, HyperConnectedLayer) and isinstance(layer.hc_config, KromHCConfig):
            raise ValueError(
                f"a {type(model).__name__} must not have hyper-connections in a part of it, since they would be lost "
                f"when it is loaded again; {path} has them. Save the part by itself with its own save_pretrained, or "
                "call remove_hyper_connections on it first."
            )


def guard_saving() -> None:
    """Has every model of transformers checked when it is saved, once."""
    save = PreTrainedModel.save_pretrained
    if hasattr(save, "_checks_hyper_connections"):
        return

    @functools.wraps(save)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        check_saved_whole(self)
        return save(self, *args, **kwargs)

    save_pretrained._checks_hyper_connections = True  # type: ignore[attr-defined]
    PreTrainedModel.save_pretrained = save_pretrained  # type: ignore[method-assign]
