"""Every private name of transformers that the package leans on, and which file needs it.

A release that lacks one fails here by name, instead of in the middle of something else.
"""

import ast
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.auto_factory import _BaseAutoModelClass, _LazyAutoMapping
from transformers.utils import output_capturing

import kromhc_hf


PACKAGE = Path(kromhc_hf.__file__).parent
MODEL, CONFIG = transformers.PreTrainedModel, transformers.PreTrainedConfig

# The name, what has it in transformers, and the files of the package that use it.
NAMES = {
    "_CAN_RECORD_REGISTRY": (output_capturing, {"modeling/host.py"}),
    "_adjust_missing_and_unexpected_keys": (MODEL, {"conversion/stored_tensors.py"}),
    "_can_record_outputs": (MODEL, {"modeling/host.py"}),
    "_can_set_attn_implementation": (MODEL, {"modeling/modeling_kromhc.py"}),
    "_can_set_experts_implementation": (MODEL, {"modeling/modeling_kromhc.py"}),
    "_extra_content": (transformers.AutoModel._model_mapping, {"modeling/host.py", "registration.py"}),
    "_get_dtype_plan": (MODEL, {"conversion/layerwise.py"}),
    "_init_weights": (MODEL, {"modeling/modeling_kromhc.py"}),
    "_initialize_missing_keys": (MODEL, {"conversion/layerwise.py"}),
    "_keep_in_fp32_modules": (MODEL, {"modeling/installation.py"}),
    "_keep_in_fp32_modules_strict": (MODEL, {"modeling/installation.py"}),
    "_model_mapping": (_BaseAutoModelClass, {"modeling/host.py"}),
    "_move_missing_keys_from_meta_to_device": (MODEL, {"conversion/layerwise.py"}),
    "_no_split_modules": (MODEL, {"modeling/installation.py"}),
    "_upload_modified_files": (CONFIG, {"modeling/remote_code.py"}),
}
# Used where a release has it: up to 5.22 a configuration knows the commit that it was loaded from.
OPTIONAL = {"_commit_hash": {"conversion/loaded_base.py"}}
# Private names of Python, torch and PEFT.
OTHERS = {
    *("_asdict", "_make", "_replace", "_getframe", "_name_", "_value_"),
    *("_member_map_", "_member_names_", "_value2member_map_"),
    *("_C", "_functorch", "_version", "_are_functorch_transforms_active", "_current_level"),
    *("_apply", "_modules", "_parameters", "_orig_mod"),
    *("_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks", "_has_any_global_hook"),
    *("_active_adapter", "_check_new_adapter_config", "_disable_adapters"),
}


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.endswith("__") and len(name) > 1


def used_and_own(path: Path) -> tuple[set[str], set[str]]:
    """The private names that a file takes from something, and those that it gives to something."""
    used, own = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            (own if isinstance(node.ctx, ast.Store) else used).add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            used |= {alias.name for alias in node.names if is_private(alias.name)}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            used |= {argument.value for argument in node.args[1:2] if isinstance(argument, ast.Constant)}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
    return {name for name in used if is_private(name)}, {name for name in own if is_private(name)}


def test_every_private_name_is_listed_with_the_files_that_use_it():
    found: dict[str, set[str]] = {}
    own: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        used, given = used_and_own(path)
        own |= given
        for name in used:
            found.setdefault(name, set()).add(path.relative_to(PACKAGE).as_posix())
    listed = {name: files for name, (_, files) in NAMES.items()} | OPTIONAL
    theirs = {name: files for name, files in found.items() if name in listed or name not in own | OTHERS}
    assert theirs == listed


@pytest.mark.parametrize("name", NAMES)
def test_the_installed_transformers_has_it(name):
    owner, files = NAMES[name]
    assert hasattr(owner, name), (
        f"transformers {transformers.__version__} has no {name} any more, which {', '.join(sorted(files))} needs; "
        "see modeling/host.py for how to live with both"
    )


def test_auto_classes_have_the_mapping_that_is_written_to():
    assert isinstance(transformers.AutoModel._model_mapping, _LazyAutoMapping)
