"""Where the hyper-connections of PEFT adapters live in a base model, and the layers and models that run with them."""

import functools
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from ..modeling.arrangement import arrange, connected_layer
from ..modeling.connection_plan import Decoder
from ..modeling.decoder_layer import (
    END_NAMES,
    PLACE_NAMES,
    HyperConnectedLayer,
    LayerArguments,
    layer_arguments,
    layer_namespace,
)
from ..modeling.host import record_outputs_of
from ..modeling.hyper_connection import Mappings
from ..modeling.layer_loop import methods_for_streams
from ..modeling.layer_spec import LayerSpec, attribute
from ..modeling.model_forward import with_readout
from ..modeling.options import StreamOptions
from ..modeling.stream_module import StreamModule


# Keys and attributes that belong to the method; adapter names such as "kromhc" must not be part of it.
TENSOR_PREFIX = "hyper_connection_"


class StreamSite(nn.Module, BaseTunerLayer):
    """The place in a decoder layer of a hyper-connection, or of a learned end of the streams: one module per adapter.

    A child of the decoder layer: PEFT takes everything in a tuner layer but its base layer for the adapter's.
    """

    adapter_layer_names = (TENSOR_PREFIX + "adapters",)
    other_param_names = ("options",)
    # PEFT's are properties that ask the base layer, which a site does not have.
    weight: Any = None
    bias: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.hyper_connection_adapters = nn.ModuleDict()
        self.options: dict[str, StreamOptions] = {}
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

    def add(self, adapter_name: str, module: StreamModule, options: StreamOptions) -> None:
        """Takes in the module of an adapter."""
        self.hyper_connection_adapters[adapter_name] = module
        self.options[adapter_name] = options

    @property
    def active_module(self) -> Any:
        """That of the active adapter."""
        return self.hyper_connection_adapters[str(self.active)]

    def forward(self, *inputs: Any) -> Any:
        return self.active_module(*inputs)

    def mappings(self, streams: Tensor) -> Mappings:
        """The mappings of the active adapter, see `HyperConnection.mappings`."""
        return self.active_module.mappings(streams)

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
    def site(self) -> StreamSite:
        return getattr(self, self.spec.names[0])

    @property
    def hc_options(self) -> StreamOptions | None:
        return self.site.options.get(str(self.site.active))

    def end(self, name: str) -> Any:
        # Not the end's own active adapter: it may have fewer than the branches, and PEFT chooses site by site.
        site, active = getattr(self, name), self.site.active
        return site.hyper_connection_adapters[active] if site and active in site.hyper_connection_adapters else None

    def reads_out_after_norm(self) -> bool:
        return self.site.active is not None and super().reads_out_after_norm()

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.site.active is None:
            return self.layer_class.forward(self, hidden_states, *args, **kwargs)
        return super().forward(hidden_states, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Adapted classes have the names of others: what they are generated from is pickled instead.
        if "layer_class" not in vars(type(self)):
            return super().__reduce_ex__(protocol)
        return _restored_layer, (self.layer_class, self.spec, tuple(self.arguments.items())), self.__dict__


class AdaptedModel:
    """Mixed in front of the class of every transformers model that owns adapted layers."""

    backbone_class: ClassVar[type]
    hc_layers_path: str | None = None

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """What PEFT saves an adapter from, which belongs to the layers that it was made for.

        Raises:
            ValueError: if a layer is not where it was.
        """
        listed = () if self.hc_layers_path is None else attribute(self, self.hc_layers_path)
        layers: list[Any] = [connected_layer(layer) for layer in listed]
        for position, layer in enumerate(layers):
            modules: Any = layer.site.hyper_connection_adapters.values() if isinstance(layer, AdaptedLayer) else ()
            for module in modules:
                if module.branch_index != position * len(layer.spec.names):
                    raise ValueError(
                        f"an adapter must be saved with the layers that it was made for; layer {position} has stood "
                        f"at {module.branch_index // len(layer.spec.names)}. Put them back, or change the layers "
                        "of the plain base and add the adapter afterwards."
                    )
        return super().state_dict(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        if "backbone_class" not in vars(type(self)):
            return super().__reduce_ex__(protocol)
        return _restored_model, (self.backbone_class,), self.__dict__


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
    namespace |= methods_for_streams(backbone_class)
    return type(backbone_class.__name__, (AdaptedModel, backbone_class), namespace | _same_name(backbone_class))


def _restored_layer(*made_from: Any) -> Any:
    layer_class: Any = _adapted_layer_class(*made_from)
    return layer_class.__new__(layer_class)


def _restored_model(backbone_class: Any) -> Any:
    model_class: Any = _adapted_model_class(backbone_class)
    model = model_class.__new__(model_class)
    record_outputs_of(model)
    return model


def _same_name(cls: type) -> dict[str, str]:
    return {"__module__": cls.__module__, "__qualname__": cls.__qualname__}


def adapt_layer(layer: Any, spec: LayerSpec) -> None:
    """Turns a checked decoder layer into its adapted class, in place, with sites that are still empty."""
    layer_class: Any = type(layer)
    layer.__class__ = _adapted_layer_class(layer_class, spec, layer_arguments(layer, spec))
    for name in spec.names:
        layer.add_module(name, StreamSite())
    for name in END_NAMES:
        layer.register_module(name, None)


def restore_layer(layer: Any) -> None:
    """The inverse of `adapt_layer`."""
    for name in (*layer.spec.names, *END_NAMES, *PLACE_NAMES):
        delattr(layer, name)
    layer.__class__ = layer.layer_class


def adapt_owners(decoder: Decoder) -> None:
    """Turns the models that own adapted layers into their adapted classes, in place."""
    for owner in decoder.owners:
        if not isinstance(owner, AdaptedModel):
            backbone_class: Any = type(owner)
            owner.__class__ = _adapted_model_class(backbone_class)
    arrange(decoder.layers, decoder.owners[-1].config)
    decoder.owners[-1].hc_layers_path = decoder.path


def restore_owners(decoder: Decoder) -> None:
    """The inverse of `adapt_owners`."""
    del decoder.owners[-1].hc_layers_path
    for owner in decoder.owners:
        owner.__class__ = owner.backbone_class
