# Code of kromhc-hf, which travels with every model that it saves.
"""What a saved model takes along so that it loads where this package is not installed, and says what it is.

Every configuration is saved with the modules that its classes are written in, as flat files, and an `auto_map` that
names the classes; `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` needs nothing else. The copies
register nothing, and they take themselves along when they are saved again.
"""

import os
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.dynamic_module_utils import get_relative_import_files

from .host import class_for_task
from .model_card import MARK, model_card
from .outside_code import FAMILY_MODULE, bound_family, family_files, joining_file
from .outside_families import BOUND


AUTO_CLASSES: tuple[Any, ...] = (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
)
# The first line of every file that travels, by which the package knows its own.
MARKER = "# Code of kromhc-hf, which travels with every model that it saves."
# What the version that had no marker yet wrote under names that are still in use.
FIRST_VERSION_FILES = frozenset(
    f"{name}.py"
    for name in (
        *("decoder_layer", "families", "foreign_code", "hyper_connection"),
        *("kernels", "mixing", "model_card", "stream_ends"),
    )
)
# transformers puts a card with this sentence where a repository has none.
GENERIC_CARD = "This model card has been automatically generated."


def class_name(backbone_class: Any, backbone_config_class: Any) -> str:
    """The name of the class with hyper-connections, `LlamaForCausalLM` -> `KromHCLlamaForCausalLM`.

    Several model types may share the class of one of them; each gets a name of its own, after its configuration.
    """
    own_stem = getattr(backbone_class.config_class, "__name__", "").removesuffix("Config")
    stem = backbone_config_class.__name__.removesuffix("Config")
    shared = backbone_class.config_class is not backbone_config_class and backbone_class.__name__.startswith(own_stem)
    return f"KromHC{stem * shared}{backbone_class.__name__.removeprefix(own_stem * shared)}"


def auto_map(config_type: Any) -> dict[str, str]:
    """Which class of which code file each Auto class stands for, for the family of a configuration class."""
    # All in one file, of which transformers then makes one copy; two would have two classes of every name.
    file = FAMILY_MODULE if config_type.backbone_config_class in BOUND else "modeling_kromhc"
    return {auto_name: f"{file}.{name}" for auto_name, name in generated_names(config_type).items()}


def generated_names(config_type: Any) -> dict[str, str]:
    """The names of the generated classes of a family, by Auto class."""
    names = {"AutoConfig": config_type.__name__}
    base: Any = config_type.backbone_config_class
    return names | {auto_name: class_name(backbone, base) for auto_name, backbone in _base_classes(base).items()}


def _base_classes(config_type: Any) -> dict[str, Any]:
    """The model classes of a family by the name of the Auto class that stands for each."""
    found = {auto_class.__name__: class_for_task(auto_class, config_type) for auto_class in AUTO_CLASSES}
    return {name: backbone for name, backbone in found.items() if backbone is not None}


def code_files() -> list[Path]:
    """The modules that travel: the one with the model classes and what it imports, directly or not."""
    modeling = Path(__file__).with_name("modeling_kromhc.py")
    return [modeling, *sorted({Path(file) for file in get_relative_import_files(modeling)})]


def write_code(folder: Path) -> bool:
    """Writes the code files into a folder, unless one of them would replace a file that is not the package's own.

    Returns:
        Whether they are in the folder now; if not, a warning says what is in the way.
    """
    if foreign := files_in_the_way(folder):
        warnings.warn(
            f"{folder} has files of somebody else by the names of code files ({', '.join(foreign)}). They are "
            "kept and the code files are left out, so the model in this folder loads where kromhc-hf is installed and "
            "nowhere else. Save it to a folder of its own to have it load everywhere.",
            stacklevel=4,
        )
        return False
    for file in code_files():
        shutil.copyfile(file, folder / file.name)
    return True


def files_in_the_way(folder: Path) -> list[str]:
    """The names of code files by which a folder has something that is not the package's own, in alphabetical order."""
    unmarked = FIRST_VERSION_FILES if _written_by_first_version(folder) else frozenset()
    return sorted(file.name for file in code_files() if not _may_be_replaced(folder / file.name, unmarked))


def take_code_along(config: Any, folder: Path) -> None:
    """Puts the code files beside a configuration that is about to be saved and names them in it, see `write_code`."""
    vars(config).pop("auto_map", None)
    if write_code(folder) and _write_family(config, folder):
        config.auto_map = auto_map(type(config))


def _write_family(config: Any, folder: Path) -> bool:
    """Writes the code of a family from outside, if it is one; returns whether everything is there that loads it."""
    bound = bound_family(config)
    if bound is None:
        return True
    # Those that its package has registered may not have been loaded.
    bound = replace(bound, models={**_base_classes(bound.config_class), **bound.models})
    files, own = family_files(bound), [file.name for file in code_files()]
    taken = {name for name, text in (files or {}).items() if _holds_another(folder / name, text)}
    if files is None or taken | {*(files or {})} & {*own, f"{FAMILY_MODULE}.py"}:
        reason = (
            f"its files {', '.join(sorted(taken | {*files} & {*own}))} bear names that are taken"
            if files
            else ("its classes are not in files that import each other as `from .x import y`")
        )
        warnings.warn(
            f"the code of model_type {bound.family.model_type!r} cannot be put beside the model in {folder}, since "
            f"{reason}. The model loads where kromhc-hf is installed, its code is imported and its row is registered.",
            stacklevel=5,
        )
        return False
    for name, content in files.items():
        (folder / name).write_bytes(content)
    names = [name.removesuffix(".py") for name in own]
    text = joining_file(config, bound, MARKER, names, generated_names(type(config)))
    (folder / f"{FAMILY_MODULE}.py").write_text(text, encoding="utf-8")
    return True


def _holds_another(path: Path, content: bytes) -> bool:
    return os.path.lexists(path) and (not path.is_file() or path.read_bytes() != content)


def _may_be_replaced(path: Path, unmarked: frozenset[str]) -> bool:
    """Whether there is no such file, or one that the package wrote itself: it bears the marker, or never had one."""
    if not os.path.lexists(path):
        return True
    if not path.is_file():
        return False
    return path.name in unmarked or is_own_code(path)


def is_own_code(path: Path) -> bool:
    """Whether a file bears the marker of those that travel."""
    return path.read_text(encoding="utf-8", errors="replace").startswith(MARKER)


def _written_by_first_version(folder: Path) -> bool:
    """Whether the model in a folder was saved with code files that bear no marker yet."""
    config = folder / "config.json"
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    return re.search(r'"modeling\.KromHC\w+"', text) is not None


class Shareable:
    """Mixed into configurations and models: an upload gets a model card of its own instead of an empty one."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do: whoever loads a copy of this file through `auto_map` saves it again in any case."""

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # A card that somebody has written is left alone.
        card = Path(working_dir) / "README.md"
        present = card.read_text(encoding="utf-8") if card.is_file() else GENERIC_CARD
        if GENERIC_CARD in present or MARK in present:
            # A configuration may be saved beside the weights of its model.
            weights = "all" if hasattr(self, "config") or any(card.parent.glob("*.safetensors")) else "none"
            config = getattr(self, "config", self)
            card.write_text(model_card(config, repo_id, tags=_tags(present), weights=weights), encoding="utf-8")
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)  # type: ignore[misc]


def _tags(card: str) -> tuple[str, ...]:
    """The tags in the metadata of a card that transformers wrote."""
    found = re.search(r"^tags:\n((?:- .*\n)*)", card, flags=re.MULTILINE)
    return tuple(line.removeprefix("- ") for line in found[1].splitlines()) if found else ()
