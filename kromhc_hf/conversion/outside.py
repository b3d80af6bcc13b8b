"""Checkpoints whose code is not in transformers: run only where the user trusts the folder that has it."""

from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..modeling.layer_fit import check_model_type
from ..modeling.model_types import PREFIX
from ..modeling.outside_code import DERIVED, FAMILY_MODULE
from ..modeling.outside_families import bind, outside_family


def runs_own_code(content: dict[str, Any], folder: Path, trust_remote_code: bool) -> bool:
    """Whether the code of a checkpoint is loaded from its folder; for families of transformers it never is.

    Args:
        content: of its config.json.
        folder: where it is.
        trust_remote_code: whether the user wants code from there to be run.

    Raises:
        ValueError: if its family is not known, or its code is needed and not trusted.
    """
    if not carries_row(content):
        check_model_type(str(content.get("model_type", "")).removeprefix(PREFIX))
    return is_loaded_by_own_code(content, folder, trust_remote_code)


def is_loaded_by_own_code(content: dict[str, Any], folder: Path, trust_remote_code: bool) -> bool:
    """The same for a family that need not be known."""
    model_type = str(content.get("model_type", ""))
    if model_type in CONFIG_MAPPING:
        return False
    if not _configuration(content):
        raise ValueError(
            f"the code of model_type {model_type!r} must be in {folder}, named in auto_map of config.json, or in a "
            "package that registers it with the Auto classes; it is in neither. Import the package."
        )
    if not trust_remote_code:
        raise ValueError(
            f"the code of model_type {model_type!r} is not in transformers but in {folder}, and must be trusted to be "
            "run. Read it, and allow it with trust_remote_code=True (--trust-remote-code)."
        )
    return True


def carries_row(content: dict[str, Any]) -> bool:
    """Whether a checkpoint with hyper-connections brings the row of its family along, as code beside it."""
    return _configuration(content).startswith(f"{FAMILY_MODULE}.")


def carries_derived_row(folder: Path) -> bool:
    """Whether the row beside a checkpoint was derived; that is read, and not run."""
    path = folder / f"{FAMILY_MODULE}.py"
    return path.is_file() and DERIVED in path.read_text(encoding="utf-8")


def _configuration(content: dict[str, Any]) -> str:
    """The class in the folder that its configuration is made by."""
    return str((content.get("auto_map") or {}).get("AutoConfig", ""))


def bind_repository(config: Any, folder: Path) -> None:
    """Notes the model classes that a base names in its configuration, which has been loaded with the code beside it."""
    family = outside_family(config, config.model_type)
    if family is None or config.model_type.startswith(PREFIX):
        return
    named = {name: reference for name, reference in config.auto_map.items() if name.startswith("AutoModel")}
    bind(family, type(config), {name: get_class_from_dynamic_module(ref, folder) for name, ref in named.items()})
