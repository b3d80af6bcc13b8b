# Code of kromhc-hf, which travels with every model that it saves.
"""KromHCConfig: the configuration of a backbone family with the hyper-connection fields beside its own.

For each family one class is made on demand, for example `KromHCLlamaConfig(KromHCConfig, LlamaConfig)` with
`model_type = "kromhc_llama"`. It is flat: everything that reads a `LlamaConfig` reads it unchanged. For a model of
several modalities there are two: `KromHCGemma3Config` holds a `KromHCGemma3TextConfig`, which has the fields.

The file is longer than others because the two kinds of configuration make each other.
"""

import copy
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

from .families import ROWS
from .foreign_code import check_own_config
from .host import config_class_name, config_class_of, has_own_init, why_absent
from .layer_fit import check_model_type
from .model_types import PREFIX, known_model_types
from .options import OPTIONS, StreamOptions, documented
from .outside_families import BOUND, REGISTERED, OutsideFamily, bind, is_from_outside, outside_family
from .remote_code import Shareable, take_code_along


# The options in a configuration, where the family's own fields stand beside them.
FIELDS = {f"hc_{name}": option for name, option in OPTIONS.items()}
# What a conversion writes down about the base.
ORIGIN = "hc_conversion"
# Keywords of the Auto classes about code in the repository.
CODE_KEYWORDS = ("trust_remote_code", "code_revision")


class KromHCConfig(Shareable):
    """Configuration of a causal language model with hyper-connections, or of a model with such a text model inside.

    `KromHCConfig(backbone_config=LlamaConfig(...), hc_num_streams=4)` returns a `KromHCLlamaConfig`: a `LlamaConfig`
    with the fields below. Any field of the backbone may be given as well and overrides the one in `backbone_config`.

    Args:
        backbone_config: the configuration of a supported family; it is copied.
        **options: of the hyper-connections with the prefix `hc_`, such as `hc_num_streams`, see `StreamOptions`.

    Raises:
        ValueError: for an unsupported family or a field value that is not allowed.
    """

    backbone_config_class: ClassVar[type[PreTrainedConfig]]
    # Called with every config class that is made; the package registers the Auto classes this way, while a copy of
    # this file on the Hub registers nothing.
    on_new_class: ClassVar[list[Callable[[type["KromHCConfig"]], None]]] = []

    def __new__(cls, *args: Any, backbone_config: PreTrainedConfig | None = None, **kwargs: Any) -> "KromHCConfig":
        if cls is KromHCConfig:
            if backbone_config is None:
                raise ValueError("KromHCConfig needs a backbone_config, for example backbone_config=LlamaConfig().")
            cls = _class_for(backbone_config)
        return super().__new__(cls)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Restores a configuration from `to_dict()`; its `model_type` says which family.

        Raises:
            ValueError: if the configuration is not one with hyper-connections, or names code outside this package.
        """
        if cls is not KromHCConfig:
            check_own_config(config_dict)
            for key in kwargs:
                if key.startswith("hc_") and key not in config_dict:
                    cls.check_field(key)
            restored = super().from_dict(config_dict, **kwargs)  # type: ignore[misc]
            # Overrides among the keyword arguments are set after construction.
            (restored[0] if isinstance(restored, tuple) else restored).validate_hyper_connections()
            return restored
        return config_class(_backbone_type(config_dict)).from_dict(config_dict, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Loads `config.json` from a folder or the Hub; takes what `AutoConfig.from_pretrained` takes."""
        # These say whether to run code of the repository, which nothing does here.
        kwargs = {name: value for name, value in kwargs.items() if name not in CODE_KEYWORDS}
        family = cls if cls is not KromHCConfig else cls.type_in(pretrained_model_name_or_path, **kwargs)
        return super(KromHCConfig, family).from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]

    @classmethod
    def type_in(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> type["KromHCConfig"]:
        """The class of the configuration in a folder or on the Hub, which is not made.

        Args:
            pretrained_model_name_or_path: the folder, file or Hub id.
            **kwargs: of `from_pretrained`; those of the Hub are used.

        Raises:
            ValueError: if it is the configuration of a model without hyper-connections, or of an unknown family.
            OSError: if there is none.
        """
        kwargs = {name: value for name, value in kwargs.items() if name not in CODE_KEYWORDS}
        config_dict, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not config_dict:
            raise FileNotFoundError(f"{pretrained_model_name_or_path} must hold a config.json; it does not.")
        return config_class(_backbone_type(config_dict))

    @classmethod
    def check_field(cls, key: str) -> None:
        """Refuses a keyword that looks like an option of hyper-connections and is none.

        Raises:
            ValueError: naming the options.
        """
        if not (key in FIELDS or key == ORIGIN or hasattr(cls.backbone_config_class, key)):
            raise ValueError(f"{key} is not a field of {cls.__name__}; the fields are {', '.join(FIELDS)}.")

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Writes `config.json` and the code files that load it, and its models, where this package is not installed."""
        os.makedirs(save_directory, exist_ok=True)
        take_code_along(self, Path(save_directory))
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    # By the source file of the class, and some releases rewrite values of custom code to what the family does not know.
    @classmethod
    def is_custom_code(cls) -> bool:
        return cls.backbone_config_class.is_custom_code()

    def to_backbone_config(self) -> PreTrainedConfig:
        """The plain configuration of the family: the same values without the hyper-connection fields."""
        return _recast(self, self.backbone_config_class)

    def validate_hyper_connections(self) -> None:
        """Refuses values that no model could be built from.

        Raises:
            ValueError: with the rule, the value and the way out.
        """
        number = self.get_text_config().num_hidden_layers  # type: ignore[attr-defined]
        with _named_as_fields():
            options = self.stream_options().in_model(number)
        for name, value in options.as_fields().items():
            setattr(self, name, value)

    def check_keywords(self, keywords: dict[str, Any], backbone_config: PreTrainedConfig | None) -> None:
        """Refuses keywords of the constructor that look like options of hyper-connections and are none.

        Raises:
            ValueError: naming the options.
        """
        # A file names its model type, and may hold any key: other models call theirs hc_ too, and what a base has of
        # them is kept. Whoever writes code means ours.
        for key in () if "model_type" in keywords else keywords:
            theirs = hasattr(backbone_config, key)
            if key.startswith("hc_") and not theirs:
                self.check_field(key)
            if f"hc_{key}" in FIELDS and backbone_config is not None and not theirs:
                raise ValueError(f"{key} must be given as hc_{key} in a configuration.")

    def take_over(self, backbone_config: PreTrainedConfig) -> None:
        """Becomes a copy of the configuration of a base.

        Raises:
            ValueError: if it is of another family, or has a field by the name of one of ours.
        """
        name, model_type = type(self).__name__, self.backbone_config_class.model_type
        if backbone_config.model_type != model_type:
            raise ValueError(
                f"backbone_config of a {name} must be of model type {model_type!r}; "
                f"got {backbone_config.model_type!r}. Use KromHCConfig(backbone_config=...)."
            )
        _check_names_are_free(backbone_config)
        vars(self).update(vars(_recast(backbone_config, type(self))))

    def stream_options(self) -> StreamOptions:
        """The options of the hyper-connections.

        Raises:
            ValueError: if one of the fields has a value that is not allowed.
        """
        with _named_as_fields():
            return StreamOptions(**{name: getattr(self, f"hc_{name}") for name in OPTIONS})


@contextmanager
def _named_as_fields() -> Iterator[None]:
    """Has a refusal name an option as it is called in a configuration, in the rule and in the way out."""
    try:
        yield
    except ValueError as error:
        message = re.sub(rf"^({'|'.join(OPTIONS)}) |\b({'|'.join(OPTIONS)})=", r"hc_\g<0>", str(error))
        raise ValueError(message) from None


KromHCConfig.__doc__ = documented(KromHCConfig.__doc__, FIELDS)


def _backbone_type(config_dict: dict[str, Any]) -> str:
    """The model type of the base in the content of a config.json.

    Raises:
        ValueError: if it is not that of a model with hyper-connections.
    """
    model_type = config_dict.get("model_type", "")
    if not model_type.startswith(PREFIX):
        raise ValueError(
            f"model_type must start with {PREFIX!r}; got {model_type!r}. "
            "Convert the checkpoint first: kromhc convert SOURCE DESTINATION."
        )
    return model_type.removeprefix(PREFIX)


def _check_names_are_free(backbone_config: PreTrainedConfig) -> None:
    """Refuses the configuration of a base that has a field of its own by the name of one of ours.

    Raises:
        ValueError: naming the field and its value.
    """
    for name in (*FIELDS, ORIGIN):
        if name in vars(backbone_config):
            raise ValueError(
                f"the configuration of the base must have no field {name}, where that of the hyper-connections goes; "
                f"got {name}={getattr(backbone_config, name)!r} in a {type(backbone_config).__name__}, which would be "
                "lost. Remove the field or rename it."
            )


def _recast(config: Any, target: type) -> Any:
    """A deep copy of `config` as an instance of `target`; private state such as the attention choice comes along."""
    recast = copy.deepcopy(config)
    recast.__class__ = target
    for name in () if issubclass(target, CompositeConfig) else FIELDS:
        if issubclass(target, KromHCConfig):
            vars(recast).setdefault(name, FIELDS[name].default)
        else:
            vars(recast).pop(name, None)
    # These describe a file that was read or its repository, not the model.
    for name in ("auto_map", "custom_pipelines", "transformers_weights", ORIGIN):
        vars(recast).pop(name, None)
    vars(recast).pop("model_type", None)  # reading a file leaves one on the instance, and it would hide the class's
    recast.architectures = None
    return recast


# By model type, and for families from outside by the class of the base, of which there may be several copies.
_CLASSES: dict[Any, type[KromHCConfig]] = {}


def config_class(model_type: str) -> type[KromHCConfig]:
    """The configuration class of a family, `config_class("llama")` -> `KromHCLlamaConfig`, made on first use.

    Raises:
        ValueError: if the family is not supported.
    """
    if model_type in _CLASSES:
        return _CLASSES[model_type]
    check_model_type(model_type)
    backbone_class = config_class_of(model_type)
    if is_from_outside(model_type):
        return outside_config_class(REGISTERED.get(model_type) or BOUND[backbone_class].family, backbone_class)
    make = _make_config_class if model_type in ROWS else _make_composite_class
    return _noted(model_type, make(model_type, backbone_class))


def outside_config_class(family: OutsideFamily, backbone_class: Any) -> type[KromHCConfig]:
    """The configuration class for one copy of the classes of a family from outside, made on first use."""
    if backbone_class not in BOUND:
        bind(family, backbone_class, {})
    if backbone_class in _CLASSES:
        return _CLASSES[backbone_class]
    return _noted(backbone_class, _make_config_class(family.model_type, backbone_class))


def _noted(key: Any, made: type[KromHCConfig]) -> type[KromHCConfig]:
    _CLASSES[key] = made
    for callback in KromHCConfig.on_new_class:
        callback(made)
    return made


def _class_for(backbone_config: Any) -> type[KromHCConfig]:
    model_type = getattr(backbone_config, "model_type", type(backbone_config).__name__)
    family = outside_family(backbone_config, model_type)
    return config_class(model_type) if family is None else outside_config_class(family, type(backbone_config))


def _make_config_class(model_type: str, backbone_class: Any) -> type[KromHCConfig]:
    name = f"KromHC{backbone_class.__name__}"
    namespace = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"{backbone_class.__name__} with hyper-connections, see `KromHCConfig`.",
        "__annotations__": {field: Any if option.read else option.kind for field, option in FIELDS.items()},
        "model_type": PREFIX + model_type,
        "backbone_config_class": backbone_class,
        "_auto_class": None,  # by which code of a repository would be copied once more, from the wrong file
        **{field: option.default for field, option in FIELDS.items()},
    }
    cls: Any = type(name, (KromHCConfig, backbone_class), namespace)
    generated_init, own_init = cls.__init__, has_own_init(backbone_class)

    def __init__(self: Any, *, backbone_config: PreTrainedConfig | None = None, **kwargs: Any) -> None:
        self.check_keywords(kwargs, backbone_config)
        if backbone_config is None and own_init:
            for field, option in FIELDS.items():
                setattr(self, field, kwargs.pop(field, option.default))
            backbone_class.__init__(self, **kwargs)
        elif backbone_config is None:
            generated_init(self, **kwargs)
        else:
            self.take_over(backbone_config)
            for key, value in kwargs.items():
                setattr(self, key, value)
            self.validate()
        self.validate_hyper_connections()

    cls.__init__ = __init__
    return cls


class CompositeConfig(KromHCConfig):
    """Configuration of a model of several modalities, whose text configuration has the hyper-connection fields.

    They can be read and set here too, `config.hc_num_streams`, and are stored there alone.
    """

    @property
    def text_key(self) -> str:
        """The field with the text configuration, such as "text_config"."""
        text = self.get_text_config()  # type: ignore[attr-defined]
        return next(name for name, value in vars(self).items() if value is text)

    def own_part(self, key: str, value: Any, fields: dict[str, Any]) -> Any:
        """A field that is given beside a base, as the base would have it.

        Args:
            key: its name.
            value: what is given.
            fields: takes the hyper-connection fields of a text configuration, where it has none of them yet.

        Raises:
            ValueError: if it is a field of the text configuration alone, or a part that is no configuration.
        """
        text: Any = self.get_text_config()  # type: ignore[attr-defined]
        if not hasattr(self, key) and hasattr(text, key):
            raise ValueError(
                f"{key} is a field of {self.text_key}, not of a {type(self).__name__}. Set "
                f"backbone_config.{self.text_key}.{key}."
            )
        plain, found = _without_streams(value)
        if isinstance(getattr(self, key, None), PreTrainedConfig) and not isinstance(plain, PreTrainedConfig):
            raise ValueError(
                f"{key} must be a configuration where a backbone_config is given; got a {type(value).__name__}. Change "
                f"backbone_config.{key}."
            )
        fields.update(found | fields)
        return plain

    def to_backbone_config(self) -> PreTrainedConfig:
        plain = _recast(self, self.backbone_config_class)
        setattr(plain, self.text_key, self.get_text_config().to_backbone_config())  # type: ignore[attr-defined]
        return plain


def _of_text_config(name: str) -> property:
    def read(self: Any) -> Any:
        return getattr(self.get_text_config(), name)

    def write(self: Any, value: Any) -> None:
        setattr(self.get_text_config(), name, value)

    return property(read, write)


def _make_composite_class(model_type: str, backbone_class: Any) -> type[KromHCConfig]:
    name = f"KromHC{backbone_class.__name__}"
    namespace = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"{backbone_class.__name__} with hyper-connections in its text model, see `KromHCConfig`.",
        "model_type": PREFIX + model_type,
        "backbone_config_class": backbone_class,
        **{field: _of_text_config(field) for field in FIELDS},
    }
    cls: Any = type(name, (CompositeConfig, backbone_class), namespace)
    generated_init = cls.__init__

    def __init__(self: Any, *, backbone_config: PreTrainedConfig | None = None, **kwargs: Any) -> None:
        self.check_keywords(kwargs, backbone_config)
        fields = {key: kwargs.pop(key) for key in FIELDS if key in kwargs}
        kwargs.pop("model_type", None)  # of the file; some families would hand it on to their text part
        if backbone_config is None:
            # Families look at the model type of their text part, and make it of a class that they name.
            parts = {key: _without_streams(part) for key, part in kwargs.items()}
            generated_init(self, **{key: plain for key, (plain, _) in parts.items()})
            fields = {key: value for _, found in parts.values() for key, value in found.items()} | fields
        else:
            self.take_over(backbone_config)
            for key, value in kwargs.items():
                setattr(self, key, self.own_part(key, value, fields))
        setattr(self, self.text_key, KromHCConfig(backbone_config=self.get_text_config(), **fields))
        if backbone_config is not None and kwargs:
            self.validate()
        self.validate_hyper_connections()

    cls.__init__ = __init__
    return cls


def _without_streams(part: Any) -> tuple[Any, dict[str, Any]]:
    """A part of a configuration as it is in the base, and the hyper-connection fields that it had."""
    if isinstance(part, KromHCConfig):
        return part.to_backbone_config(), {field: getattr(part, field) for field in FIELDS}
    if isinstance(part, dict) and str(part.get("model_type", "")).startswith(PREFIX):
        plain = {key: value for key, value in part.items() if key not in FIELDS}
        found = {key: value for key, value in part.items() if key in FIELDS}
        return {**plain, "model_type": _backbone_type(part)}, found
    return part, {}


def config_class_named(name: str) -> type[KromHCConfig] | None:
    """The configuration class of that name, made on first use; None if no family has one."""
    for model_type in known_model_types():
        if name == f"KromHC{config_class_name(model_type)}":
            return config_class(model_type)
    for bound in reversed(BOUND.values()):
        if name == f"KromHC{bound.config_class.__name__}":
            return outside_config_class(bound.family, bound.config_class)
    return None


def __getattr__(name: str) -> Any:
    # Pickle looks a generated class up by name.
    found = config_class_named(name)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}" + why_absent(name))
    return found
