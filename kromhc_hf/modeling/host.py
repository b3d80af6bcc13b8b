# Code of kromhc-hf, which travels with every model that it saves.
"""What the files that travel lean on inside transformers, where it is private or differs between releases.

What a release does is detected: by what it has, and by how the forwards of its layers are written.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import transformers


# In front of the others, since it says which releases of transformers will do.


# isort: split
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.integrations.awq import AWQ_SCALES_MAPPINGS
from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, hub
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .outside_families import BOUND, bound_to


# What releases and families call the argument by which a layer, or a module in it, is given the cache.
CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past", "cache_params")


def why_absent(name: str) -> str:
    """What to add to an AttributeError where code that was saved with a model asks for a class of its family."""
    if not name.startswith("KromHC"):
        return ""
    return (
        f": transformers {transformers.__version__} does not have its family. Install the release that "
        "transformers_version in the config.json of the model names, or a newer one"
    )


def commit_of(repository: str, revision: str | None = None) -> str | None:
    """The commit of a Hub repository that a revision stands for now, None if that cannot be found out."""
    resolve: Any = getattr(hub, "resolve_revision", None)
    if resolve is not None:
        return getattr(resolve(repository, revision), "resolved", None)
    # Up to 5.17 the folder says it in which a file of that revision is cached.
    with suppress(OSError):
        return hub.extract_commit_hash(hub.cached_file(repository, "config.json", revision=revision), None)
    return None


def load_tensors(model: Any, tensors: dict[str, Any], loading: Any) -> Any:
    """Puts the tensors of a checkpoint into a model by a LoadStateDictConfig; returns what was missing and the like."""
    # Earlier releases want the plan of tensor parallelism as well.
    takes = inspect.signature(convert_and_load_state_dict_in_model).parameters
    plan: dict[str, Any] = {"tp_plan": None} if "tp_plan" in takes else {}
    return convert_and_load_state_dict_in_model(model, tensors, loading, **plan)[0]


def tie_missing(model: Any, missing: set[str]) -> None:
    """Takes out of `missing` what a model on the meta device ties to tensors that are there."""
    tied = model.all_tied_weights_keys
    # Where both are there, transformers compares their values, which meta tensors do not have.
    model.all_tied_weights_keys = {one: other for one, other in tied.items() if {one, other} & missing}
    try:
        model.tie_weights(missing_keys=missing, recompute_mapping=False)
    finally:
        model.all_tied_weights_keys = tied


def written(function: Any) -> Any:
    """A forward as it stands in its file, without decorators, also those that do not say what they wrap."""
    function = inspect.unwrap(function)
    inside = (cell.cell_contents for cell in getattr(function, "__closure__", None) or ())
    found = next((f for f in inside if inspect.isfunction(f) and f.__name__ == "forward"), None)
    return function if found is None else written(found)


def forward_parameters(module: Any) -> tuple[tuple[str, ...], bool]:
    """The names that the forward of a module or its class takes after `self`, and whether it takes any others."""
    forward: Any = getattr(module if isinstance(module, type) else type(module), "forward", None)
    parameters = list(inspect.signature(written(forward)).parameters.values())[1:]
    named = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def forward_defaults(layer_class: Any) -> dict[str, Any]:
    """What the arguments of a forward are that are not given."""
    parameters = inspect.signature(written(layer_class.forward)).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def cache_name(names: tuple[str, ...]) -> str | None:
    """Which of a forward's parameters is the cache, None if none is."""
    return next((name for name in names if name in CACHE_NAMES), None)


def config_class_of(model_type: str) -> Any:
    """The configuration class of a model type, imported on first use; from outside, the one that was loaded last.

    Raises:
        ValueError: if the code of a family from outside has not been loaded.
    """
    if model_type in CONFIG_MAPPING:
        return CONFIG_MAPPING[model_type]
    if loaded := bound_to(model_type):
        return loaded[0].config_class
    raise ValueError(
        f"the code of model_type {model_type!r}, which is not in transformers, must be loaded first. Import the "
        "package that has it, or load the model with an Auto class: AutoModelForCausalLM.from_pretrained(..., "
        "trust_remote_code=True)."
    )


def has_own_init(config_type: Any) -> bool:
    """Whether somebody wrote how a configuration is made, which a class derived from it is not made by."""
    # What dataclasses generate is in no file.
    return inspect.unwrap(config_type.__init__).__code__.co_filename != "<string>"


def forget_model_type(model_type: str) -> None:
    """Undoes the registration of a model type with AutoConfig, if there was one."""
    CONFIG_MAPPING._extra_content.pop(model_type, None)


def config_class_name(model_type: str) -> str:
    """The name of that class, without importing it."""
    return (
        CONFIG_MAPPING_NAMES[model_type] if model_type in CONFIG_MAPPING_NAMES else config_class_of(model_type).__name__
    )


def class_for_task(auto_class: Any, config_type: Any) -> Any:
    """The model class that an Auto class stands for with a configuration class, None if there is none.

    None too where it is the class of the text model alone, which is made from a part of the configuration.
    """
    if config_type in BOUND and auto_class.__name__ in BOUND[config_type].models:
        return BOUND[config_type].models[auto_class.__name__]
    found = auto_class._model_mapping.get(config_type, None)
    parts = {part for part in config_type.sub_configs.values() if part is not config_type}
    return None if getattr(found, "config_class", None) in parts else found


def class_names_for_task(auto_class: Any, model_type: str) -> tuple[str, ...]:
    """The names of the classes that an Auto class knows for a model type, without importing them."""
    names = auto_class._model_mapping._model_mapping.get(model_type, ())
    outside = (class_for_task(auto_class, bound.config_class) for bound in bound_to(model_type))
    return (*((names,) if isinstance(names, str) else names), *(cls.__name__ for cls in outside if cls is not None))


def name_for_task(auto_class: Any, model_type: str, name: str) -> None:
    """Lists the name of a class among those that do a task.

    By this list Trainer tells under label smoothing that labels are shifted, and servers what a model takes.
    """
    auto_class._model_mapping._model_mapping[model_type] = name


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


def mirror_activation_scales(model_type: str, new_type: str) -> None:
    """Has AWQ scale the activations of a model type where it does so for another one, whose name it goes by."""
    if model_type in AWQ_SCALES_MAPPINGS:
        AWQ_SCALES_MAPPINGS[new_type] = AWQ_SCALES_MAPPINGS[model_type]


def record_outputs_of(model: Any) -> None:
    """Has hidden states and attentions recorded for the class that a model has now.

    The registry is keyed by class: after a change of class recorded outputs would vanish in silence.
    """
    # By its text, which is what the plain dict up to 5.22 takes and the one that takes models makes of them.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(model)), model._can_record_outputs)


@contextmanager
def weights_of_this_save(folder: Path, removes: bool) -> Iterator[None]:
    """Removes what a save over other weights leaves and a loader would take: the one file, or the index of shards.

    Which of the two is old is told by what the save has written, not by times, which may lie in the future.

    Args:
        folder: that is saved into.
        removes: whether this process does so.
    """
    paths = [folder / name for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)]
    before = [_state(path) for path in paths]
    yield
    written = [_state(path) not in (None, state) for path, state in zip(paths, before)]
    if removes and sum(written) == 1:
        paths[written.index(False)].unlink(missing_ok=True)  # another process may have been faster


def _state(path: Path) -> tuple[int, ...] | None:
    """What changes with every write of a file, whatever time is set for it; None if there is none."""
    if not path.is_file():
        return None
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
