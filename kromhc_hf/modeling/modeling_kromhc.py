"""KromHCForCausalLM and its siblings: a family's own model classes, with hyper-connections in their decoder layers.

`KromHCLlamaForCausalLM(KromHCForCausalLM, LlamaForCausalLM)` is generated from the family's class; head, loss, cache,
attention backends, tied weights and parallelism plans are inherited and never written again.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .configuration_kromhc import PREFIX, KromHCConfig, config_class, config_class_named
from .decoder_layer import END_NAMES, HyperConnectedLayer, connect_layer
from .hyper_connection import StreamModule, readout
from .layer_fit import fit_layer, layer_specs, supported_model_types
from .layer_spec import LayerSpec, attribute
from .remote_code import Shareable, class_name


class HyperConnectedModel(Shareable):
    """Mixed in front of every transformers model class between the root and the decoder layers."""

    backbone_class: ClassVar[type[PreTrainedModel]]
    auto_class: ClassVar[Any] = None

    def __new__(cls, config: Any = None, *args: Any, **kwargs: Any) -> "HyperConnectedModel":
        if not hasattr(cls, "backbone_class"):
            cls = cls.class_for(config)
        return super().__new__(cls)

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        with _known_to_auto_model(type(config)):
            config.validate_hyper_connections()
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        plan = plan_connections(self)
        # A head that builds its base model through AutoModel finds it connected already.
        if not isinstance(plan.layers[0], HyperConnectedLayer):
            connect(self, plan)

    @classmethod
    def class_for(cls, config: Any) -> type[Any]:
        """The generated class for a configuration.

        Raises:
            ValueError: if `config` is not a KromHCConfig, or the family has no model for this task.
        """
        if not isinstance(config, KromHCConfig):
            raise ValueError(
                f"{cls.__name__} needs a KromHCConfig; got {type(config).__name__}. "
                "Use KromHCConfig(backbone_config=...)."
            )
        backbone = cls.backbone_for(type(config))
        if backbone is None:
            raise ValueError(f"{config.backbone_config_class.model_type} has no model for {cls.auto_class.__name__}.")
        return model_class(backbone, type(config))

    @classmethod
    def backbone_for(cls, config_type: type[KromHCConfig]) -> type[PreTrainedModel] | None:
        """The family's own class for the task of this face, if it has one."""
        return cls.auto_class._model_mapping.get(config_type.backbone_config_class, None)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Loads a checkpoint with hyper-connections, see `PreTrainedModel.from_pretrained`."""
        if hasattr(cls, "backbone_class"):
            return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)  # type: ignore[misc]
        # The dtype to load in is not the one that the configuration records.
        dtype = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
        if config is None:
            config, kwargs = KromHCConfig.from_pretrained(
                pretrained_model_name_or_path, return_unused_kwargs=True, **kwargs
            )
        return cls.class_for(config).from_pretrained(
            pretrained_model_name_or_path, *args, config=config, **kwargs, **dtype
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, StreamModule):
            module.reset_parameters()
        else:
            super()._init_weights(module)  # type: ignore[misc]

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Tensor and data parallelism as transformers does it; pipeline stages pass `[B, S, C]`, which streams are not.

        Raises:
            ValueError: for pipeline parallelism.
        """
        if getattr(distributed_config, "pp_size", None) not in (None, 1):
            raise ValueError(
                f"pp_size must be 1 for a model with hyper-connections, whose layers pass on [B, S, n, C] where "
                f"pipeline stages expect [B, S, C]; got {distributed_config.pp_size}. Use tp_size or fsdp_size."
            )
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)  # type: ignore[misc]

    # These look at the source file of the class, and it is the family's file that they are about. Custom code would
    # also skip weight conversions and part of the initialisation.
    @classmethod
    def is_custom_code(cls) -> bool:
        return cls.backbone_class.is_custom_code()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return cls.backbone_class._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls.backbone_class._can_set_experts_implementation()


@contextmanager
def _known_to_auto_model(config_type: Any) -> Iterator[None]:
    """For heads that build their base model through `AutoModel`, where a copy of this file on the Hub is unknown."""
    registered: Any = AutoModel._model_mapping
    backbone = KromHCModel.backbone_for(config_type)
    if backbone is None or config_type in registered:
        yield
        return
    registered.register(config_type, model_class(backbone, config_type), exist_ok=True)
    try:
        yield
    finally:
        registered._extra_content.pop(config_type, None)


class KromHCModel(HyperConnectedModel):
    """A base model with hyper-connections, for `AutoModel`."""

    auto_class = AutoModel


class KromHCForCausalLM(HyperConnectedModel):
    """A causal language model with hyper-connections: `KromHCForCausalLM(KromHCConfig(...))`.

    Constructing or loading it returns the class of the family, for example `KromHCLlamaForCausalLM`.

    Raises:
        ValueError: if the configuration is not a KromHCConfig.
    """

    auto_class = AutoModelForCausalLM


class KromHCForSequenceClassification(HyperConnectedModel):
    """A sequence classifier with hyper-connections, for `AutoModelForSequenceClassification`."""

    auto_class = AutoModelForSequenceClassification


class KromHCForTokenClassification(HyperConnectedModel):
    """A token classifier with hyper-connections, for `AutoModelForTokenClassification`."""

    auto_class = AutoModelForTokenClassification


class KromHCForQuestionAnswering(HyperConnectedModel):
    """A question answering model with hyper-connections, for `AutoModelForQuestionAnswering`."""

    auto_class = AutoModelForQuestionAnswering


FACES = (
    KromHCForCausalLM,
    KromHCForSequenceClassification,
    KromHCForTokenClassification,
    KromHCForQuestionAnswering,
    KromHCModel,
)


class ConnectionPlan:
    """Where the hyper-connections of a model go, found and checked before anything is changed.

    Args:
        owners: the transformers models from the outermost inwards; the last one holds the decoder layers.
        layers: the decoder layers.
        candidates: what each of them may look like.
    """

    def __init__(self, owners: list[Any], layers: nn.ModuleList, candidates: tuple[LayerSpec, ...]):
        self.owners, self.layers, self.candidates = owners, layers, candidates
        self.names = {*END_NAMES, *(name for spec in candidates for name in spec.names)}

    def check(self) -> list[LayerSpec]:
        """The specification of every layer; raises ValueError if one is not what the table of families says."""
        expected = self.owners[0].config.num_hidden_layers
        if len(self.layers) < expected:
            raise ValueError(
                f"the model must have config.num_hidden_layers = {expected} decoder layers, since the last one reads "
                f"the streams out; got {len(self.layers)}. Set config.num_hidden_layers = {len(self.layers)}."
            )
        if len({id(layer) for layer in self.layers}) < len(self.layers):
            raise ValueError("every decoder layer must be a module of its own; got one that is used several times.")
        return [fit_layer(layer, self.candidates, position) for position, layer in enumerate(self.layers)]


def plan_connections(model: Any) -> ConnectionPlan:
    """Finds the decoder layers of a model and everything that owns them.

    Raises:
        ValueError: if the family is not supported, or the layers are not where its row says.
    """
    model_type = model.config.model_type.removeprefix(PREFIX)
    candidates = layer_specs(model.config, model_type)
    path = candidates[0].layers
    # A base_model_prefix that names nothing makes the model its own base; the base is then one of its children.
    bases = [model.base_model, *(child for child in model.children() if isinstance(child, PreTrainedModel))]
    owners: list[Any] = [model]
    module: Any = next((base for base in bases if attribute(base, path) is not None), model)
    for name in (None, *path.split(".")):
        module = attribute(module, name) if name else module
        if isinstance(module, PreTrainedModel) and module is not owners[-1]:
            owners.append(module)
    if not isinstance(module, nn.ModuleList) or len(module) == 0:
        raise ValueError(
            f"{type(model).__name__} must have its decoder layers at {path!r} of the base model; got {module!r}."
        )
    return ConnectionPlan(owners, module, candidates)


def connect(model: Any, plan: ConnectionPlan) -> None:
    """Carries a checked plan out: swaps the classes of owners and layers and adds the hyper-connections.

    Every owner's `config` must be a KromHCConfig already.
    """
    for position, (layer, spec) in enumerate(zip(plan.layers, plan.check())):
        connect_layer(layer, spec, model.config, position)
    layer_names = {type(layer).__name__ for layer in plan.layers}
    native_names = {layer.layer_class.__name__ for layer in plan.layers}  # type: ignore[union-attr]
    for owner in plan.owners:
        if not isinstance(owner, HyperConnectedModel):
            owner.__class__ = model_class(type(owner), type(model.config))
        # Keyed by class: without it, recorded outputs silently vanish after the swap.
        _CAN_RECORD_REGISTRY[owner] = owner._can_record_outputs
        # FSDP wrapping refuses a name that no module of the model has, so the family's own goes.
        owner._no_split_modules = {*(owner._no_split_modules or ())} - native_names | layer_names
        owner._keep_in_fp32_modules_strict = {*(owner._keep_in_fp32_modules_strict or ()), *plan.names}


def model_class(backbone_class: Any, config_type: Any) -> type[Any]:
    """The class with hyper-connections for one of a family's model classes, `LlamaModel` -> `KromHCLlamaModel`.

    Several model types may share the class of one of them; each gets a class of its own, named after its configuration.
    """
    return _model_class(backbone_class, config_type)


def with_readout(backbone_forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's forward whose recorded hidden states are read out, `[B, S, n, C]` -> `[B, S, C]`."""

    # Trainer, generate and pipelines read the signature.
    @functools.wraps(backbone_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Always a dict inside: in a bare tuple, streams [B, S, n, C] and attentions [B, H, S, S] look the same.
        return_dict = kwargs.pop("return_dict", None)
        outputs = backbone_forward(self, *args, return_dict=True, **kwargs)
        if getattr(outputs, "hidden_states", None) is not None:
            last_layer = [module for module in self.modules() if isinstance(module, HyperConnectedLayer)][-1]
            outputs["hidden_states"] = tuple(
                last_layer.read_out(h) if h is not None and h.dim() == 4 else h for h in outputs.hidden_states
            )
        if getattr(self.config, "hc_readout", None) == "norm_sum" and plan_connections(self).owners[-1] is self:
            _sum_normed_streams(outputs, self.config.hc_num_streams)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return outputs if return_dict else outputs.to_tuple()

    return forward


@functools.cache
def _model_class(backbone_class: Any, config_type: Any) -> type[Any]:
    model_type = config_type.backbone_config_class.model_type
    face = next((face for face in FACES if backbone_class.__name__ in _listed(face, model_type)), HyperConnectedModel)
    name = class_name(backbone_class, config_type.backbone_config_class)
    namespace = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"{backbone_class.__name__} with hyper-connections.",
        "config_class": config_type,
        "backbone_class": backbone_class,
        "forward": with_readout(backbone_class.forward),
    }
    # Weight conversions are keyed by class name or by model type: each is mirrored under the same kind of key.
    for key, new_key in ((backbone_class.__name__, name), (model_type, config_type.model_type)):
        conversion = get_checkpoint_conversion_mapping(key)
        if conversion is not None:
            register_checkpoint_conversion_mapping(new_key, conversion, overwrite=True)
    return type(name, (face, backbone_class), namespace)


def _sum_normed_streams(outputs: Any, num_streams: int) -> None:
    """Sums the streams of a base model's output after the final norm, in place."""
    normed = outputs.last_hidden_state
    # [B, S, n, C], or [B * n, S, C] with the same order in memory where the model restores its input's shape.
    length = normed.shape[1]
    outputs["last_hidden_state"] = readout(normed.reshape(-1, length, num_streams, normed.shape[-1]), "norm_sum")
    if getattr(outputs, "hidden_states", None) is not None:
        outputs["hidden_states"] = (*outputs.hidden_states[:-1], outputs.last_hidden_state)


def _listed(face: type[HyperConnectedModel], model_type: str) -> tuple[str, ...]:
    """The names of the family's classes for the task of a face, without importing them."""
    names = face.auto_class._model_mapping._model_mapping.get(model_type, ())
    return (names,) if isinstance(names, str) else tuple(names)


def __getattr__(name: str) -> Any:
    # Pickle and `auto_map` look a generated class up by name. Configurations too: transformers makes a copy of the code
    # for every file that `auto_map` names, and there must be one alone.
    config_type: Any = config_class_named(name)
    if config_type is not None:
        return config_type
    plain = name.removeprefix("KromHC")
    for face in FACES if name.startswith("KromHC") else ():
        for model_type in supported_model_types():
            stem = CONFIG_MAPPING_NAMES[model_type].removesuffix("Config")
            if plain in _listed(face, model_type) or plain.startswith(stem):
                config_type = config_class(model_type)
                backbone = face.backbone_for(config_type)
                if backbone is not None and class_name(backbone, config_type.backbone_config_class) == name:
                    return model_class(backbone, config_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
