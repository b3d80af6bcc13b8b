# Code of kromhc-hf, which travels with every model that it saves.
"""The one decoder layer forward that serves every family, and the classes generated from it."""

import functools
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .host import CACHE_NAMES, cache_name, forward_defaults, forward_parameters
from .hyper_connection import HyperConnection
from .layer_returns import Returned, returned_beside, returned_values
from .layer_spec import END_NAMES, LayerSpec, Step, Sublayer, attribute
from .options import StreamOptions
from .stream_blocks import branches_of_block
from .stream_ends import READOUTS, StreamExpansion, StreamReadout, expand
from .stream_module import StreamModule


# What arrangement.py sets.
PLACE_NAMES = ("hc_config", "hc_layer_index", "hc_first_layer", "hc_last_layer")


PROBABILITY = (int, float)  # of a functional dropout
Connections = dict[str, StreamModule | None]


class Arguments(NamedTuple):
    """Which arguments of a layer reach one of its sublayers."""

    names: tuple[tuple[str, str], ...]  # of the layer, of the sublayer
    layer_names: frozenset[str]  # what the layer's own forward names, its cache by any name
    others: bool  # whether the sublayer takes what the layer does not name

    def select(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        selected = {new: kwargs[name] for name, new in self.names if name in kwargs}
        if self.others:
            selected.update((name, value) for name, value in kwargs.items() if name not in self.layer_names)
        return selected


class HyperConnectedLayer(nn.Module):
    """Mixed in front of a family's decoder layer: runs its sublayers between reads from and writes to the streams.

    The first such layer expands `[B, S, C]` to streams `[B, S, n, C]`, the last one that runs reads them out again, and
    in between the hidden states that the model passes from layer to layer are the streams. Where a layer stands is set
    by arrangement.py.
    """

    layer_class: ClassVar[type[nn.Module]]
    spec: ClassVar[LayerSpec]
    positional_names: ClassVar[tuple[str, ...]]
    interface: ClassVar["Interface"]
    arguments: ClassVar[dict[str, Arguments]]
    defaults: ClassVar[dict[str, Any]]  # of the layer's own arguments

    hc_config: Any = None
    hc_options: Any  # StreamOptions, of the active adapter where there are adapters
    hc_layer_index: int
    hc_first_layer: int  # of those with streams
    hc_last_layer: int
    expand_hc: StreamExpansion | None
    readout_hc: StreamReadout | None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Some models pass cache and mask by position, in the order of the original signature.
        kwargs.update(zip(self.positional_names, args))
        streams: Any = hidden_states
        if streams.dim() == 3:
            if self.spec.wide is not None and attribute(self, self.spec.wide):
                streams = streams.float()
            streams = self.make_streams(streams)
        outputs: dict[str, Any] = {}
        branches = branches_of_block(self) if self.training or torch.is_grad_enabled() else 0
        for step in self.spec.steps:
            branch_input, write = getattr(self, step.name)(streams, branches)
            streams = write(self.run_step(step, branch_input, kwargs, outputs))
        if self.spec.gain is not None:
            streams = streams * attribute(self, self.spec.gain)
        # Read at run time: assisted generation leaves early by lowering num_hidden_layers.
        ends = self.hc_layer_index in (self.hc_last_layer, self.hc_config.num_hidden_layers - 1)
        if ends and not self.reads_out_after_norm():
            streams = self.read_out(streams)
        returned = self.interface.returned
        return streams if returned is None else (streams, *returned_values(returned, outputs, self.defaults | kwargs))

    def extra_repr(self) -> str:
        derived = "row derived from the source of its forward" if self.spec.derived else ""
        return ", ".join(filter(None, (super().extra_repr(), derived)))

    def end(self, name: str) -> Any:
        """The learned module at one end of the streams, if there is one."""
        return getattr(self, name)

    def make_streams(self, hidden_states: Tensor) -> Tensor:
        """`[B, S, C]` -> `[B, S, n, C]`."""
        if self.hc_layer_index != self.hc_first_layer:
            raise ValueError(
                f"layer {self.hc_layer_index} ({self.layer_class.__name__}) must be given the streams of the layer "
                f"before it, [B, S, n, C]; got {list(hidden_states.shape)}. Run all layers by setting "
                f"config.num_hidden_layers (now {self.hc_config.num_hidden_layers}) to their number, and put a layer "
                "with hyper-connections into no other model than one with hyper-connections."
            )
        expansion = self.end("expand_hc")
        return expand(hidden_states, self.hc_options.num_streams) if expansion is None else expansion(hidden_states)

    def reads_out_after_norm(self) -> bool:
        """Whether the model joins the streams itself, behind its final norm."""
        return READOUTS[self.hc_options.readout].after_norm

    def read_out(self, streams: Tensor) -> Tensor:
        """`[B, S, n, C]` -> `[B, S, C]`."""
        learned, readout = self.end("readout_hc"), READOUTS[self.hc_options.readout]
        if learned is not None:
            return learned(streams)
        if readout.module is not None:
            raise ValueError(
                f"readout {self.hc_options.readout!r} must be used with all {self.hc_config.num_hidden_layers} layers, "
                f"since its weights belong to the last one; got an early exit after layer {self.hc_layer_index}. "
                "Use readout='mean'."
            )
        return readout.join(streams)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Generated classes have no importable name: what they are generated from is pickled instead. Those that users
        # or torch derive from them are not ours to restore.
        if "layer_class" not in vars(type(self)):
            return super().__reduce_ex__(protocol)
        return _restored, (self.layer_class, self.spec, self.interface), self.__dict__

    def run_step(self, step: Step, branch_input: Tensor, kwargs: dict[str, Any], outputs: dict[str, Any]) -> Tensor:
        """The branch output of one residual step; puts into `outputs` all that a module returned beside its own."""
        branch_output: Tensor | None = None
        normed: dict[str | None, Tensor] = {None: branch_input}
        for sublayer in step.sublayers:
            # Parallel sublayers may share a norm.
            if sublayer.pre is not None and sublayer.pre not in normed:
                norm = attribute(self, sublayer.pre)
                normed[sublayer.pre] = norm(branch_input.to(norm.weight.dtype) if sublayer.cast else branch_input)
            output = self.run_sublayer(sublayer, normed[sublayer.pre], kwargs, outputs)
            branch_output = output if branch_output is None else branch_output + output
        assert branch_output is not None
        for name in step.post:
            branch_output = self.call(name, branch_output)
        if step.scale is not None:
            branch_output = branch_output * attribute(self, step.scale)
        shape = branch_input.shape  # some experts return [B * S, C]
        return branch_output if branch_output.shape == shape else branch_output.view(shape)

    def run_sublayer(
        self, sublayer: Sublayer, hidden_states: Tensor, kwargs: dict[str, Any], outputs: dict[str, Any]
    ) -> Tensor:
        """The output of one sublayer behind its norm; see `run_step`."""
        if sublayer.input_scale is not None:
            hidden_states = hidden_states * attribute(self, sublayer.input_scale)
        output: Any = None
        for name in sublayer.modules:
            arguments = self.arguments[name].select(kwargs) if sublayer.attention else {}
            if sublayer.zero is not None:
                arguments[sublayer.zero] = torch.zeros((), dtype=hidden_states.dtype, device=hidden_states.device)
            output = self.call(name, *(hidden_states,) * sublayer.repeat, **arguments)
            if isinstance(output, tuple):
                outputs[name] = output
            hidden_states = output[0] if isinstance(output, tuple) else output
        if sublayer.bias is not None and output[sublayer.bias] is not None:
            hidden_states = hidden_states + output[sublayer.bias]
        if sublayer.times is not None:
            hidden_states = hidden_states * kwargs[sublayer.times]
        for name in sublayer.post:
            hidden_states = self.call(name, hidden_states)
        if sublayer.scale is not None:
            hidden_states = hidden_states * attribute(self, sublayer.scale)
        return hidden_states

    def call(self, name: str, *inputs: Tensor, **arguments: Any) -> Any:
        """Calls the attribute, or drops out with the probability that it is."""
        part = attribute(self, name)
        if isinstance(part, PROBABILITY):
            return F.dropout(inputs[0], p=part, training=self.training)
        return part(*inputs, **arguments)


def _arguments(layer: nn.Module, sublayer: Sublayer, name: str) -> Arguments:
    """Which arguments reach the module at `name`, as the layer's own forward would pass them."""
    layer_names, _ = forward_parameters(layer)
    if cache_name(layer_names) is not None:
        # Whoever calls may go by the name that the cache has in another release; the layer's own comes last and wins.
        layer_names = (layer_names[0], *(set(CACHE_NAMES) - {*layer_names}), *layer_names[1:])
    known = frozenset(layer_names)
    if isinstance(attribute(layer, name), PROBABILITY):
        return Arguments((), known, False)
    named, others = forward_parameters(attribute(layer, name))
    renames = dict(sublayer.renames)
    if (cache := cache_name(named)) is not None:
        renames |= {n: cache for n in CACHE_NAMES if n in layer_names}
    names = [(n, renames.get(n, n)) for n in layer_names[1:] if n in renames or n not in renames.values()]
    everything = others and not sublayer.recurrent
    return Arguments(tuple(pair for pair in names if everything or pair[1] in named[1:]), known, others)


class Interface(NamedTuple):
    """What a live layer passes on to its modules and returns.

    Args:
        arguments: for each module that takes the layer's arguments, which of them reach it.
        returned: see `returned_beside`.
    """

    arguments: tuple[tuple[str, Arguments], ...]
    returned: Returned


def layer_interface(layer: nn.Module, spec: LayerSpec) -> Interface:
    """The interface of a layer that fits a specification."""
    layer_class: Any = type(layer)
    arguments = tuple(
        (name, _arguments(layer, sublayer, name))
        for sublayer in spec.sublayers
        if sublayer.attention
        for name in sublayer.modules
    )
    return Interface(arguments, returned_beside(layer, layer_class))


def layer_namespace(layer_class: Any, spec: LayerSpec, interface: Interface) -> dict[str, Any]:
    """The class attributes that `HyperConnectedLayer.forward` reads, for a family's decoder layer."""
    return {
        "__doc__": f"{layer_class.__name__} with hyper-connections.",
        "layer_class": layer_class,
        "spec": spec,
        "interface": interface,
        "positional_names": forward_parameters(layer_class)[0][1:],  # after hidden_states
        "arguments": dict(interface.arguments),
        "defaults": forward_defaults(layer_class),
    }


@functools.cache
def _layer_class(layer_class: Any, spec: LayerSpec, interface: Interface) -> type[HyperConnectedLayer]:
    name = f"KromHC{layer_class.__name__}"
    namespace = {"__module__": __name__, "__qualname__": name, **layer_namespace(layer_class, spec, interface)}
    return type(name, (HyperConnectedLayer, layer_class), namespace)


def _restored(*made_from: Any) -> HyperConnectedLayer:
    layer_class: Any = _layer_class(*made_from)
    return layer_class.__new__(layer_class)


def make_expansion(options: StreamOptions, hidden_size: int, device: Any = None) -> StreamExpansion | None:
    """What makes the streams, where that is learned."""
    return StreamExpansion(hidden_size, options.num_streams, device=device) if options.stream_embedding else None


def make_readout(options: StreamOptions, hidden_size: int, device: Any = None) -> StreamReadout | None:
    """What joins the streams, where that is learned."""
    module = READOUTS[options.readout].module
    return None if module is None else module(hidden_size, options.num_streams, options.eps, device=device)


def new_connections(layer: Any, spec: LayerSpec, options: StreamOptions, config: Any, position: int) -> Connections:
    """The modules that hyper-connections add to the decoder layer at a position, by the name of the attribute.

    They are on the device of the layer and in its mode; the ends of the streams are None where nothing is learned.
    """
    # Where loading builds the model on the meta device, a family may still have real tensors of its own.
    devices = {parameter.device.type: parameter.device for parameter in layer.parameters()}
    device = devices.get("meta", next(layer.parameters()).device)
    size, first_branch = config.hidden_size, position * len(spec.names)
    made: Connections = {
        name: HyperConnection(size, options.num_streams, branch_index=branch, device=device, **options.of_branch())
        for branch, name in enumerate(spec.names, start=first_branch)
    }
    layers = options.layers_of(config.num_hidden_layers)
    made["expand_hc"] = make_expansion(options, size, device) if position == layers[0] else None
    made["readout_hc"] = make_readout(options, size, device) if position == layers[-1] else None
    for module in made.values():
        if module is not None:
            module.train(layer.training)
    return made


def connect_layer(layer: Any, spec: LayerSpec, config: Any, options: StreamOptions, position: int) -> None:
    """Turns a checked decoder layer into its hyper-connected class, in place, and adds the hyper-connections."""
    connections = new_connections(layer, spec, options, config, position)
    layer_class: Any = type(layer)
    layer.__class__ = _layer_class(layer_class, spec, layer_interface(layer, spec))
    layer.hc_options = options
    for name, module in connections.items():
        layer.register_module(name, module)


def disconnect_layer(layer: Any) -> None:
    """The inverse of `connect_layer`."""
    for name in (*layer.spec.names, *END_NAMES):
        delattr(layer, name)
    for name in ("hc_options", *PLACE_NAMES):
        delattr(layer, name)
    layer.__class__ = layer.layer_class
