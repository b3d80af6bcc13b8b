"""The warning that an adapter is saved without the hyper-connections that its base has in memory."""

import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from ..applying import has_hyper_connections
from ..conversion.files import read_json
from ..modeling.model_types import PREFIX
from ..modeling.stream_module import StreamModule


def warn_of_streams_left_out(peft_model: Any, model: Any) -> None:
    """Warns where adapters will be loaded on a base without hyper-connections, though the model in memory has some.

    No warning where the base was loaded with its hyper-connections, where the adapter has them in modules_to_save, and
    where nothing on disk tells what the base is.

    Args:
        peft_model: a PeftModel that is about to be saved.
        model: the transformers model in it.
    """
    if not has_hyper_connections(model):
        return
    # `original_module` and `modules_to_save` are PEFT's names for the two halves of what is in modules_to_save.
    left_out = sorted(
        {
            path.rpartition(".")[2]
            for path, module in model.named_modules()
            if isinstance(module, StreamModule)
            and any(True for _ in module.parameters())
            and not {"original_module", "modules_to_save"} & set(path.split("."))
        }
    )
    if not left_out:
        return
    for name, config in peft_model.peft_config.items():
        base = config.base_model_name_or_path or model.name_or_path
        model_type = _stored_model_type(base, config.revision)
        if model_type is not None and not model_type.startswith(PREFIX):
            warnings.warn(
                f"An adapter must be saved with the hyper-connections of its model, or name a base that has them; "
                f"{name!r} is saved without {', '.join(left_out)} of {type(model).__name__}, and its base {base} has "
                f"model_type {model_type!r}: it will be loaded without them. Save the whole model, with "
                "merge_and_unload() and save_pretrained. From the start: save_pretrained and from_pretrained before "
                f"PEFT, or modules_to_save={left_out}, which trains them too.",
                UserWarning,
                stacklevel=3,
            )
            return


def _stored_model_type(base: str | None, revision: str | None) -> str | None:
    """The model type of a checkpoint in a folder or in the cache of the Hub, None if it is not known."""
    if not base:
        return None
    path = Path(base) / "config.json"
    if not Path(base).is_dir():
        try:
            path = Path(str(try_to_load_from_cache(base, "config.json", revision=revision)))
        except HFValidationError:
            return None
    try:
        return read_json(path).get("model_type")
    except (OSError, ValueError):
        return None
