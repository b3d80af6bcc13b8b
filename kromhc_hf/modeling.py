"""KromHCForCausalLM and its siblings: a family's own model classes, with hyper-connections in their decoder layers.

`KromHCLlamaForCausalLM(KromHCForCausalLM, LlamaForCausalLM)` is generated from the family's class; head, loss, cache,
attention backends, tied weights and parallelism plans are inherited and never written again.
"""

import functools
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .architectures import LayerSpec, attribute, check_layer, layer_spec
from .configuration import PREFIX, KromHCConfig, config_class
from .decoder_layer import END_NAMES, HyperConnectedLayer, connect_layer
from .hyper_connection import Float32Module, readout


class HyperConnectedModel:
    """Mixed in front of every transformers model class between the root and the decoder layers."""

    backbone_class: ClassVar[type[PreTrainedModel]]
    auto_class: ClassVar[Any] = None

    def __new__(cls, config: Any = None, *args: Any, **kwargs: Any) -> "HyperConnectedModel":
        if not hasattr(cls, "backbone_class"):
            cls = cls.class_for(config)
        return super().__new__(cls)

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        plan = plan_connections(self)
        # A head that builds its base model through AutoModel finds it connected already.
        if not isinstance(plan.layers[0], HyperConnectedLayer):
            plan.check()
            connect(self, plan)

    @classmethod
    def class_for(cls, config: Any) -> type["HyperConnectedModel"]:
        """The generated class for a configuration.

        Raises:
            ValueError: if `config` is not a KromHCConfig, or the family has no model for this task.
        """
        if not isinstance(config, KromHCConfig):
            raise ValueError(
                f"{cls.__name__} needs a KromHCConfig; got {type(config).__name__}. Use KromHCConfig(backbone_config=...)."
            )
        backbone = cls.auto_class._model_mapping.get(config.backbone_config_class, None)
        if backbone is None:
            raise ValueError(f"{config.backbone_config_class.model_type} has no model for {cls.auto_class.__name__}.")
        return model_class(backbone)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Loads a checkpoint with hyper-connections, see `PreTrainedModel.from_pretrained`."""
        if hasattr(cls, "backbone_class"):
            return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)  # type: ignore[misc]
        if config is None:
            config, kwargs = KromHCConfig.from_pretrained(
                pretrained_model_name_or_path, return_unused_kwargs=True, **kwargs
            )
        return cls.class_for(config).from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Float32Module):
            module.reset_parameters()
        else:
            super()._init_weights(module)  # type: ignore[misc]

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


FACES = (KromHCForCausalLM, KromHCForSequenceClassification, KromHCModel)


class ConnectionPlan:
    """Where the hyper-connections of a model go, found and checked before anything is changed.

    Args:
        owners: the transformers models from the outermost inwards; the last one holds the decoder layers.
        layers: the decoder layers.
        spec: how each of them looks.
    """

    def __init__(self, owners: list[Any], layers: nn.ModuleList, spec: LayerSpec):
        self.owners, self.layers, self.spec = owners, layers, spec

    def check(self) -> None:
        """Raises ValueError if any layer is not what the table of families says."""
        for position, layer in enumerate(self.layers):
            check_layer(layer, self.spec, position)


def plan_connections(model: Any) -> ConnectionPlan:
    """Finds the decoder layers of a model and everything that owns them.

    Raises:
        ValueError: if the family is not supported, or the layers are not where its row says.
    """
    model_type = model.config.model_type.removeprefix(PREFIX)
    spec = layer_spec(model.config, model_type)
    owners = [model]
    module = model.base_model
    for name in (None, *spec.layers.split(".")):
        module = attribute(module, name) if name else module
        if isinstance(module, PreTrainedModel) and module is not owners[-1]:
            owners.append(module)
    if not isinstance(module, nn.ModuleList) or len(module) == 0:
        raise ValueError(
            f"{type(model).__name__} must have its decoder layers at {spec.layers!r} of the base model; got {module!r}."
        )
    return ConnectionPlan(owners, module, spec)


def connect(model: Any, plan: ConnectionPlan) -> None:
    """Carries a checked plan out: swaps the classes of owners and layers and adds the hyper-connections.

    Every owner's `config` must be a KromHCConfig already.
    """
    for position, layer in enumerate(plan.layers):
        connect_layer(layer, plan.spec, model.config, position)
    layer_names = {type(layer).__name__ for layer in plan.layers}
    for owner in plan.owners:
        if not isinstance(owner, HyperConnectedModel):
            owner.__class__ = model_class(type(owner))
        # Keyed by class: without it, recorded outputs silently vanish after the swap.
        _CAN_RECORD_REGISTRY[owner] = owner._can_record_outputs
        owner._no_split_modules = {*(owner._no_split_modules or ()), *layer_names}
        owner._keep_in_fp32_modules_strict = {
            *(owner._keep_in_fp32_modules_strict or ()),
            *plan.spec.names,
            *END_NAMES,
        }


def model_class(backbone_class: type[PreTrainedModel]) -> type[Any]:
    """The class with hyper-connections for one of a family's model classes, `LlamaModel` -> `KromHCLlamaModel`."""
    assert backbone_class.config_class is not None
    return _model_class(backbone_class, config_class(backbone_class.config_class.model_type))


@functools.cache
def _model_class(backbone_class: type[PreTrainedModel], config_type: type[KromHCConfig]) -> type[Any]:
    model_type = config_type.backbone_config_class.model_type
    face = next((face for face in FACES if _belongs(backbone_class, model_type, face)), HyperConnectedModel)
    name = f"KromHC{backbone_class.__name__}"
    backbone_forward = backbone_class.forward

    # Trainer, generate and pipelines read the signature.
    @functools.wraps(backbone_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Always a dict inside: in a bare tuple, streams [B, S, n, C] and attentions [B, H, S, S] look the same.
        return_dict = kwargs.pop("return_dict", None)
        outputs = backbone_forward(self, *args, return_dict=True, **kwargs)
        if getattr(outputs, "hidden_states", None) is not None:
            last_layer = plan_connections(self).layers[-1]
            outputs["hidden_states"] = tuple(
                last_layer.read_out(h) if h is not None and h.dim() == 4 else h for h in outputs.hidden_states
            )
        if self.config.hc_readout == "norm_sum" and plan_connections(self).owners[-1] is self:
            _sum_normed_streams(outputs, self.config.hc_num_streams)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return outputs if return_dict else outputs.to_tuple()

    namespace = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"{backbone_class.__name__} with hyper-connections.",
        "config_class": config_type,
        "backbone_class": backbone_class,
        "forward": forward,
    }
    conversion = get_checkpoint_conversion_mapping(model_type)
    if conversion is not None:
        # By model type and never by class name, or head and base model would both apply it.
        register_checkpoint_conversion_mapping(config_type.model_type, conversion, overwrite=True)  # type: ignore[attr-defined]
    return type(name, (face, backbone_class), namespace)


def _sum_normed_streams(outputs: Any, num_streams: int) -> None:
    """Sums the streams of a base model's output after the final norm, in place."""
    normed = outputs.last_hidden_state
    # [B, S, n, C], or [B * n, S, C] with the same order in memory where the model restores its input's shape.
    length = normed.shape[1]
    outputs["last_hidden_state"] = readout(normed.reshape(-1, length, num_streams, normed.shape[-1]), "norm_sum")
    if getattr(outputs, "hidden_states", None) is not None:
        outputs["hidden_states"] = (*outputs.hidden_states[:-1], outputs.last_hidden_state)


def _belongs(backbone_class: type[PreTrainedModel], model_type: str, face: type[HyperConnectedModel]) -> bool:
    names = face.auto_class._model_mapping._model_mapping.get(model_type, ())
    return backbone_class.__name__ in ((names,) if isinstance(names, str) else names)


def __getattr__(name: str) -> Any:
    # Pickle and `auto_map` look a generated class up by name.
    for face in FACES:
        for model_type, names in face.auto_class._model_mapping._model_mapping.items():
            if name.removeprefix("KromHC") in ((names,) if isinstance(names, str) else names) and name != names:
                if model_type in CONFIG_MAPPING_NAMES:
                    return face.class_for(config_class(model_type)())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
