"""The one decoder layer forward that serves every family, and the classes generated from it."""

import functools
import inspect
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .architectures import LayerSpec, Sublayer, attribute
from .configuration import KromHCConfig
from .hyper_connection import HyperConnection, expand, readout
from .stream_ends import LEARNED_READOUTS, StreamExpansion, StreamReadout


# Beside the hyper-connections, where the streams begin and end in a learned way: on the first and on the last layer.
END_NAMES = ("expand_hc", "readout_hc")


class HyperConnectedLayer(nn.Module):
    """Mixed in front of a family's decoder layer: runs its sublayers between reads from and writes to the streams.

    The first layer expands `[B, S, C]` to streams `[B, S, n, C]`, the last one that runs reads them out again, and in
    between the hidden states that the model passes from layer to layer are the streams.
    """

    layer_class: ClassVar[type[nn.Module]]
    spec: ClassVar[LayerSpec]
    positional_names: ClassVar[tuple[str, ...]]
    accepted_names: ClassVar[dict[str, frozenset[str] | None]]

    hc_config: Any
    hc_layer_index: int
    expand_hc: StreamExpansion | None
    readout_hc: StreamReadout | None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Some models pass cache and mask by position, in the order of the original signature.
        kwargs.update(zip(self.positional_names, args))
        streams = hidden_states if hidden_states.dim() == 4 else self.make_streams(hidden_states)
        attention_weights = None
        for name, sublayers in zip(self.spec.names, self.spec.steps):
            branch_input, write = getattr(self, name)(streams)
            branch_output = None
            for sublayer in sublayers:
                output, weights = self.run_sublayer(sublayer, branch_input, kwargs)
                branch_output = output if branch_output is None else branch_output + output
                attention_weights = weights if sublayer.attention else attention_weights
            streams = write(branch_output)
        # Read at run time: assisted generation leaves early by lowering num_hidden_layers.
        # "norm_sum" is carried out by the model, after its final norm.
        is_last = self.hc_layer_index == self.hc_config.num_hidden_layers - 1
        if is_last and self.hc_config.hc_readout != "norm_sum":
            streams = self.read_out(streams)
        return streams if self.spec.returns == "tensor" else (streams, attention_weights)

    def make_streams(self, hidden_states: Tensor) -> Tensor:
        """`[B, S, C]` -> `[B, S, n, C]`."""
        if self.expand_hc is not None:
            return self.expand_hc(hidden_states)
        return expand(hidden_states, self.hc_config.hc_num_streams)

    def read_out(self, streams: Tensor) -> Tensor:
        """`[B, S, n, C]` -> `[B, S, C]`."""
        if self.readout_hc is not None:
            return self.readout_hc(streams)
        kind = self.hc_config.hc_readout
        if kind in LEARNED_READOUTS:
            raise ValueError(
                f"readout {kind!r} must be used with all {self.hc_config.num_hidden_layers} layers, since its weights "
                f"belong to the last one; got an early exit after layer {self.hc_layer_index}. Use readout='mean'."
            )
        return readout(streams, kind)

    def run_sublayer(self, sublayer: Sublayer, hidden_states: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
        """The branch output of one sublayer, and what else it returned (attention weights or router logits)."""
        if sublayer.pre is not None:
            hidden_states = getattr(self, sublayer.pre)(hidden_states)
        extra = None
        for name in sublayer.modules:
            arguments = {}
            if sublayer.attention:
                accepted = self.accepted_names[name]
                arguments = {k: v for k, v in kwargs.items() if accepted is None or k in accepted}
            if sublayer.zero is not None:
                arguments[sublayer.zero] = torch.zeros((), dtype=hidden_states.dtype, device=hidden_states.device)
            output = getattr(self, name)(hidden_states, **arguments)
            hidden_states, extra = output[:2] if isinstance(output, tuple) else (output, None)
        for name in sublayer.post:
            hidden_states = getattr(self, name)(hidden_states)
        if sublayer.drop is not None:
            hidden_states = F.dropout(hidden_states, p=attribute(self, sublayer.drop), training=self.training)
        if sublayer.scale is not None:
            hidden_states = hidden_states * attribute(self, sublayer.scale)
        return hidden_states, extra


def _accepted_names(module: Any) -> frozenset[str] | None:
    """The keyword arguments that a module's forward takes, None for any."""
    parameters = inspect.signature(inspect.unwrap(type(module).forward)).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(parameter.name for parameter in parameters)


@functools.cache
def _layer_class(
    layer_class: type[nn.Module], spec: LayerSpec, accepted_names: tuple[tuple[str, frozenset[str] | None], ...]
) -> type[HyperConnectedLayer]:
    parameters = inspect.signature(inspect.unwrap(layer_class.forward)).parameters.values()
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    name = f"KromHC{layer_class.__name__}"
    namespace = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"{layer_class.__name__} with hyper-connections.",
        "layer_class": layer_class,
        "spec": spec,
        "positional_names": tuple(positional[2:]),  # after self and hidden_states
        "accepted_names": dict(accepted_names),
    }
    return type(name, (HyperConnectedLayer, layer_class), namespace)


def connect_layer(layer: nn.Module, spec: LayerSpec, config: KromHCConfig | Any, position: int) -> None:
    """Turns a checked decoder layer into its hyper-connected class, in place, and adds the hyper-connections."""
    attention = [name for step in spec.steps for sublayer in step if sublayer.attention for name in sublayer.modules]
    accepted_names = tuple((name, _accepted_names(getattr(layer, name))) for name in attention)
    device = next(layer.parameters()).device
    layer.__class__ = _layer_class(type(layer), spec, accepted_names)
    layer.hc_config, layer.hc_layer_index = config, position
    for step, name in enumerate(spec.names):
        hyper_connection = HyperConnection(
            config.hidden_size,
            config.hc_num_streams,
            variant=config.hc_variant,
            branch_index=position * len(spec.names) + step,
            init=config.hc_init,
            residual_logit=config.hc_residual_logit,
            dynamic=config.hc_dynamic,
            eps=config.hc_eps,
            sinkhorn_iterations=config.hc_sinkhorn_iterations,
            device=device,
        )
        layer.add_module(name, hyper_connection.train(layer.training))
    sizes = (config.hidden_size, config.hc_num_streams)
    is_first, is_last = position == 0, position == config.num_hidden_layers - 1
    wants_embedding, learned = config.hc_stream_embedding and is_first, LEARNED_READOUTS.get(config.hc_readout)
    layer.register_module("expand_hc", StreamExpansion(*sizes, device=device) if wants_embedding else None)
    layer.register_module("readout_hc", learned(*sizes, config.hc_eps, device=device) if learned and is_last else None)


def disconnect_layer(layer: HyperConnectedLayer) -> None:
    """The inverse of `connect_layer`."""
    for name in (*layer.spec.names, *END_NAMES):
        delattr(layer, name)
    del layer.hc_config, layer.hc_layer_index
    layer.__class__ = layer.layer_class


def __getattr__(name: str) -> Any:
    # Pickle looks a generated class up by name; the layers of a model are made before it can be unpickled.
    for cls in HyperConnectedLayer.__subclasses__():
        if cls.__name__ == name:
            return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
