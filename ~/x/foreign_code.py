# Code of kromhc-hf, which travels with every model that it saves.
"""What a configuration file may name: no code outside this package is ever loaded or passed on."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


# Fields whose values transformers turns into code of a repository.
CODE_FIELDS = ("auto_map", "custom_pipelines")
# These choose a function of transformers by name, or a kernel to download by repository, ORG/NAME.
KERNEL_FIELD = re.compile(r"_?(attn|experts)_implementation(_internal)?")
# In files of the first version the module was called `modeling`.
OWN_CLASS = re.compile(r"(modeling(_kromhc)?|kromhc_family)\.KromHC\w+")
LOCAL_CLASS = re.compile(r"\w+\.\w+")


def check_own_config(content: dict[str, Any]) -> None:
    """Refuses the configuration of a converted model that names code other than this package's.

    Raises:
        ValueError: naming the field and the value.
    """
    _check_kernels(content, "config.json")
    for field, reference in _references(content):
        if field != "auto_map" or not OWN_CLASS.fullmatch(reference):
            raise ValueError(
                f"{field} of a converted model must name classes of kromhc_hf alone, such as "
                f"'modeling_kromhc.KromHCLlamaForCausalLM'; got {reference!r}. Remove the field from config.json if "
                "you trust the rest of the repository."
            )
    weights = content.get("transformers_weights")
    if weights is not None and not re.fullmatch(r"[^/\\]+\.safetensors(\.index\.json)?", str(weights)):
        raise ValueError(
            f"transformers_weights must name a safetensors file or index of the same folder; got {weights!r}. "
            "Correct config.json."
        )


def check_base_config(content: dict[str, Any], path: Path) -> None:
    """Refuses a file of a base checkpoint that names code of another repository.

    Code of its own repository is not refused, but stays behind: the native class of transformers is used.

    Raises:
        ValueError: naming the file, the field and the value.
    """
    _check_kernels(content, path)
    for field, reference in _references(content):
        if not LOCAL_CLASS.fullmatch(reference):
            raise ValueError(
                f"{field} in {path} must not name code outside its own folder; got {reference!r}. Remove the field: "
                "the native class of transformers is used for the conversion."
            )


def without_code(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a JSON file without the fields that name code."""
    return {
        name: without_code(value) if isinstance(value, dict) else value
        for name, value in content.items()
        if name not in CODE_FIELDS
    }


def _references(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The field and the reference of everything that is named as code, in nested configurations too."""
    for name, value in content.items():
        if name in CODE_FIELDS:
            for reference in _strings(value, only="impl" if name == "custom_pipelines" else None):
                yield name, reference
        elif isinstance(value, dict):
            yield from _references(value)


def _strings(value: Any, only: str | None) -> Iterator[str]:
    if isinstance(value, dict):
        for name, part in value.items():
            if only is None or isinstance(part, dict) or name == only:
                yield from _strings(part, only)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _strings(part, only)
    elif value is not None:
        yield str(value)


def _check_kernels(content: dict[str, Any], path: Path | str) -> None:
    for name, value in content.items():
        if KERNEL_FIELD.fullmatch(str(name)):
            for choice in _strings(value, only=None):
                if "/" in choice:
                    raise ValueError(
                        f"{name} in {path} must name a function of transformers, such as 'sdpa'; got {choice!r}, "
                        "which is a kernel to download. Remove the field, and pass attn_implementation to "
                        "from_pretrained if you trust it."
                    )
        elif isinstance(value, dict):
            _check_kernels(value, path)
