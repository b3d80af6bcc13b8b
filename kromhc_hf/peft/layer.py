"""Where the hyper-connections of PEFT adapters live in a base model, and the layers and models that run with them."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from ..modeling.decoder_layer import END_NAMES, HyperConnectedLayer, LayerArguments, layer_arguments, layer_namespace
from ..modeling.hyper_connection import HyperConnection, Mappings, has_hooks
from ..modeling.kernels import UnwrittenStreams
from ..modeling.layer_spec import LayerSpec
from ..modeling.modeling_kromhc import with_readout


# Keys and attributes that belong to the method; adapter names such as "kromhc" must not be part of it.
TENSOR_PREFIX = "hyper_connection_"


class StreamSettings:
    """What a decoder layer reads from a KromHCConfig, for a base model whose own config has no such fields."""

    def __init__(self, backbone_config: Any, num_streams: int, readout: str):
        self.backbone_config = backbone_config
        self.hc_num_streams, self.hc_readout = num_streams, readout

    @property
    def num_hidden_layers(self) -> int:
        return self.backbone_config.num_hidden_layers


class HyperConnectionSite(nn.Module, BaseTunerLayer):
    """The place of one hyper-connection in a decoder layer, with one `HyperConnection` per adapter.

    A child of the decoder layer: PEFT takes everything in a tuner layer but its base layer for the adapter's.
    """

    adapter_layer_names = (TENSOR_PREFIX + "adapters",)
    other_param_names = ("settings",)
    # PEFT's are properties that ask the base layer, which a site does not have.
    weight: Any = None
    bias: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.hyper_connection_adapters = nn.ModuleDict()
        self.settings: dict[str, StreamSettings] = {}
        self._disable_adapters, self._active_adapter, self.merged_adapters = False, [], []

    @property
    def active(self) -> str | None:
        """The name of the adapter in use, None if the base model is to run as it is."""
        if self.disable_adapters:
            return None
        names = [name for name in self.active_adapters if name in self.hyper_connection_adapters]
        return names[0] if names else None

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        own = [name for name in names if name in self.hyper_connection_adapters]
        if len(own) > 1:
            raise ValueError(
                f"One adapter of hyper-connections can be active at a time, since each has streams of its own; got "
                f"{own}. Use set_adapter({own[0]!r})."
            )
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    @property
    def hyper_connection(self) -> HyperConnection:
        """That of the active adapter."""
        module = self.hyper_connection_adapters[str(self.active)]
        assert isinstance(module, HyperConnection)
        return module

    def forward(self, streams: Tensor | UnwrittenStreams) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        return self.hyper_connection(streams)

    def writes_first(self, write: Callable[[Tensor], Tensor]) -> bool:
        """See `HyperConnection.writes_first`."""
        return not has_hooks(self) and self.hyper_connection.writes_first(write)

    def mappings(self, streams: Tensor) -> Mappings:
        """The mappings of the active adapter, see `HyperConnection.mappings`."""
        return self.hyper_connection.mappings(streams)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        refuse_merge()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # A hyper-connection is made on the device of its decoder layer.
        return


def refuse_merge() -> None:
    """Raises ValueError with the reason why hyper-connections cannot be merged."""
    raise ValueError(
        "Hyper-connections cannot be merged into the base model: they depend on the token and act between the layers, "
        "and no weight of the base does either. Use unload() to get the base back, or adapter_to_model(model) for a "
        "full model with hyper-connections."
    )


class AdaptedLayer(HyperConnectedLayer):
    """A decoder layer that runs with the active adapter's hyper-connections, or natively without one."""

    @property
    def site(self) -> HyperConnectionSite:
        return getattr(self, self.spec.names[0])

    @property
    def hc_config(self) -> StreamSettings:
        assert self.site.active is not None
        return self.site.settings[self.site.active]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.site.active is None:
            return self.layer_class.forward(self, hidden_states, *args, **kwargs)
        return super().forward(hidden_states, *args, **kwargs)


class AdaptedModel:
    """Mixed in front of the class of every transformers model that owns adapted layers."""

    backbone_class: ClassVar[type]


# Adapted classes keep the name and module of the family's: to everything that goes by names (device maps, FSDP
# wrapping, recorded outputs, auto_mapping in the adapter's config) the base is still the plain model.
@functools.cache
def _adapted_layer_class(layer_class: type[nn.Module], spec: LayerSpec, arguments: LayerArguments) -> type:
    namespace = layer_namespace(layer_class, spec, arguments)
    return type(layer_class.__name__, (AdaptedLayer, layer_class), namespace | _same_name(layer_class))


@functools.cache
def _adapted_model_class(backbone_class: type[PreTrainedModel]) -> type:
    forward = with_readout(backbone_class.forward)
    namespace = {"__doc__": backbone_class.__doc__, "backbone_class": backbone_class, "forward": forward}
    return type(backbone_class.__name__, (AdaptedModel, backbone_class), namespace | _same_name(backbone_class))


def _same_name(cls: type) -> dict[str, str]:
    return {"__module__": cls.__module__, "__qualname__": cls.__qualname__}


def adapt_layer(layer: Any, spec: LayerSpec, position: int) -> None:
    """Turns a checked decoder layer into its adapted class, in place, with sites that are still empty."""
    layer_class: Any = type(layer)
    layer.__class__ = _adapted_layer_class(layer_class, spec, layer_arguments(layer, spec))
    layer.hc_layer_index = position
    for name in spec.names:
        layer.add_module(name, HyperConnectionSite())
    for name in END_NAMES:
        layer.register_module(name, None)


def restore_layer(layer: Any) -> None:
    """The inverse of `adapt_layer`."""
    for name in (*layer.spec.names, *END_NAMES):
        delattr(layer, name)
    del layer.hc_layer_index
    layer.__class__ = layer.layer_class


def adapt_model(model: Any) -> None:
    """Turns a model that owns adapted layers into its adapted class, in place."""
    backbone_class: Any = type(model)
    model.__class__ = _adapted_model_class(backbone_class)


def restore_model(model: Any) -> None:
    """The inverse of `adapt_model`."""
    model.__class__ = model.backbone_class
