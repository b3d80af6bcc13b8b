"""More streams for a trained KromHC model: a Kronecker factor is added to every mixing matrix."""

import copy
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .applying import has_hyper_connections
from .evaluation_mode import evaluation_mode
from .modeling.composite import replace_config, text_model_of
from .modeling.connection_plan import find_decoder
from .modeling.decoder_layer import HyperConnectedLayer, make_expansion, make_readout
from .modeling.hyper_connection import HyperConnection
from .modeling.layer_fit import check_own_forward
from .modeling.layer_spec import END_NAMES
from .modeling.options import StreamOptions
from .modeling.stream_ends import READOUTS, SigmoidReadout, SoftmaxReadout, StreamExpansion, StreamReadout
from .modeling.variants_permutations import KromHCMixing, prime_factors
from .whole_models import check_not_a_part


class Growth(NamedTuple):
    """What growing did to a model."""

    num_streams_before: int
    num_streams: int
    # Largest absolute difference of the model's first output (the logits) on random tokens; where there are several
    # modalities, of that of the text model inside.
    max_difference: float


class Digit(NamedTuple):
    """Where a new factor of size `size` goes among the factors of n, and what that makes of each new stream."""

    size: int
    position: int
    stream: Tensor  # [n * size], the old stream that a new one is a copy of
    copy: Tensor  # [n * size], which copy it is


@torch.no_grad()
def grow_streams(model: Any, factor: int = 2, *, kept: float = 0.999) -> Growth:
    """Multiplies the number of streams of a KromHC model by `factor`, in place, and measures what that changed.

    Every stream is copied, `h_res` gets a factor that is close to the identity, and the weight with which a stream was
    read is split unevenly between its copies, so that they can separate. All of this keeps the function in exact
    arithmetic, except that a share of `sigmoid(z)` is no sigmoid of a linear function of `z`: the split is exact for
    static mappings, and for dynamic ones up to second order in the dynamic part, times `1 - kept`.

    The hyper-connections are new modules: make a new optimizer afterwards.

    Args:
        model: a model with hyper-connections of variant "kromhc".
        factor: by how much to multiply the number of streams.
        kept: share of a stream's read weight that stays with one of its copies. Closer to 1 changes the model less;
            a trained 260K model changed its loss by 3e-2, 1e-3, 1e-4 and 1e-5 at .75, .99, .999 and .9999.

    Raises:
        ValueError: if the model cannot be grown; it is then unchanged.
    """
    if not has_hyper_connections(model):
        raise ValueError(
            f"model must have hyper-connections to grow; got {type(model).__name__} without them. "
            "Use apply_hyper_connections(model, num_streams=...)."
        )
    check_not_a_part(model, "grown in", "grow_streams")
    config = model.config
    before = config.hc_num_streams
    if not isinstance(config.stream_options().mixing(), KromHCMixing) or before == 1:
        raise ValueError(
            "only models of variant 'kromhc' with at least 2 streams can be grown, since it adds a Kronecker factor; "
            f"got variant {config.hc_variant!r} with {before} streams. Give the base model more streams instead."
        )
    if config.stream_options().dynamic and (config.hc_generator, config.hc_read) != ("dense", "weights"):
        raise ValueError(
            "only models with generator 'dense' and read 'weights' can be grown, since copies of a stream share its "
            f"weights; got {config.hc_generator!r} and {config.hc_read!r}. Give the base model more streams instead."
        )
    if not READOUTS[config.hc_readout].sums_to_one:
        raise ValueError(
            f"readout {config.hc_readout!r} would multiply the final hidden state by {factor}. "
            "Only models with a readout whose weights sum to 1 can be grown."
        )
    if isinstance(factor, bool) or not isinstance(factor, int) or factor < 2:
        raise ValueError(f"factor must be an int of at least 2; got {factor!r}. Use factor=2 to double the streams.")
    if not 0 < kept < 1:
        raise ValueError(f"kept must lie between 0 and 1, both excluded; got {kept!r}. The default is 0.999.")
    # Refuses a number of streams that the variant is not defined for.
    replace(config.stream_options(), num_streams=before * factor)
    decoder = find_decoder(model)
    for position, layer in enumerate(decoder.layers):
        check_own_forward(layer, position)
        _check_own_modules(layer, position)

    with evaluation_mode(model):
        expected = _probe(model)
        config = copy.deepcopy(config)  # other models may share it
        steps = []
        for size in prime_factors(factor):
            digit = _new_digit(config.hc_num_streams, size)
            config.hc_num_streams *= size
            steps.append((digit, config.stream_options()))
        # All are made before the first takes its place.
        grown = [(layer, _grown_modules(layer, steps, kept)) for layer in decoder.connected]
        replace_config(model, config)
        for layer, modules in grown:
            layer.hc_options = config.stream_options()
            for name, module in modules.items():
                setattr(layer, name, module)
        difference = (_probe(model) - expected).abs().max().item()
    return Growth(before, config.hc_num_streams, difference)


def _probe(model: Any) -> Tensor:
    """The first output on fixed random tokens, in float32."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
    text_model = text_model_of(model)
    return text_model(input_ids=ids.to(text_model.device), return_dict=True, use_cache=False)[0].float()


def _new_digit(num_streams: int, size: int) -> Digit:
    factors = prime_factors(num_streams)
    position = sum(present < size for present in factors)  # the factors stay in ascending order
    streams = torch.arange(num_streams).reshape(factors).unsqueeze(position)
    copies = torch.arange(size).reshape(-1, *(1,) * (len(factors) - position))
    shape = (*factors[:position], size, *factors[position:])
    return Digit(size, position, streams.expand(shape).flatten(), copies.expand(shape).flatten())


def _modules(layer: Any) -> dict[str, Any]:
    """What hyper-connections have added to a layer, by the name of the attribute."""
    names = (*layer.spec.names, *END_NAMES) if isinstance(layer, HyperConnectedLayer) else ()
    return {name: module for name in names if (module := getattr(layer, name)) is not None}


def _check_own_modules(layer: Any, position: int) -> None:
    """Refuses modules that something is wrapped around or made of, or whose parameters are somewhere else."""
    own = {HyperConnection, StreamExpansion, *(readout.module for readout in READOUTS.values())}
    for name, module in _modules(layer).items():
        if type(module) not in own or any(parameter.is_meta for parameter in module.parameters()):
            raise ValueError(
                f"a model must have its own hyper-connections in memory to be grown; got {type(module).__name__} as "
                f"{name} of layer {position}, or parameters that are not there. Grow the model before PEFT, "
                "parametrisations, sharding or offloading."
            )


def _grown_modules(layer: Any, steps: list[tuple[Digit, StreamOptions]], kept: float) -> dict[str, Any]:
    hidden_size, modules = layer.hc_config.hidden_size, _modules(layer)
    for digit, options in steps:
        for name, module in modules.items():
            if isinstance(module, HyperConnection):
                modules[name] = _grow_hyper_connection(module, options, digit, kept)
            elif isinstance(module, StreamExpansion):
                assert module.weight is not None
                weight = module.weight[digit.stream]
                modules[name] = _filled(make_expansion(options, hidden_size), module, {"weight": weight})
            else:
                modules[name] = _grow_readout(module, make_readout(options, hidden_size), digit, kept)
    return modules


def _grow_hyper_connection(old: HyperConnection, options: StreamOptions, digit: Digit, kept: float) -> HyperConnection:
    new = HyperConnection(
        old.hidden_size,
        options.num_streams,
        branch_index=old.branch_index,
        kernel=old.kernel,
        **options.of_branch(),
    )
    assert isinstance(old.mixing, KromHCMixing)
    assert isinstance(new.mixing, KromHCMixing)
    assert old.bias is not None
    assert new.bias is not None
    # Over all branches each copy is preferred equally often; within one branch the copies must differ.
    preferred = digit.copy == old.branch_index // old.num_streams % digit.size
    pre, post, residual = old.bias.split(old.mixing.sizes)
    pre, slope = _split_sigmoid(pre[digit.stream], _shares(preferred, digit.size, kept))
    logits = list(residual.split(old.mixing.logits_per_factor))
    first_logit = sum(new.mixing.logits_per_factor[: digit.position])
    added = new.mixing.logits_per_factor[digit.position]
    logits.insert(digit.position, new.bias[2 * new.num_streams + first_logit :][:added].to(pre))
    values = {"bias": torch.cat([pre, post[digit.stream], *logits])}
    if old.weight is not None and old.alpha is not None:
        pre, post, residual = _grow_columns(old.weight, digit).split(old.mixing.sizes)
        rows = list(residual.split(old.mixing.logits_per_factor))
        rows.insert(digit.position, residual.new_zeros(added, residual.shape[1]))
        values["weight"] = torch.cat([pre[digit.stream] * slope[:, None], post[digit.stream], *rows])
        values["alpha"] = old.alpha
    return _filled(new, old, values)


def _grow_readout(old: StreamReadout, new: StreamReadout | None, digit: Digit, kept: float) -> StreamReadout:
    values: dict[str, Tensor] = dict(old.named_parameters())
    if isinstance(old, SoftmaxReadout):
        values["bias"] = old.bias[digit.stream]
    elif isinstance(old, SigmoidReadout):
        shares = _shares(digit.copy == 0, digit.size, kept)
        values["bias"], slope = _split_sigmoid(old.bias[digit.stream], shares)
        values["weight"] = _grow_columns(old.weight, digit)[digit.stream] * slope[:, None]
    return _filled(new, old, values)


def _shares(preferred: Tensor, size: int, kept: float) -> Tensor:
    """`kept` for the preferred one of the copies of a stream, the rest in equal parts for the others, in float64."""
    rest = (1 - kept) / (size - 1)
    return torch.full(preferred.shape, rest, dtype=torch.float64).masked_fill(preferred, kept)


def _split_sigmoid(logit: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """The logit z' with `sigmoid(z') = share * sigmoid(logit)`, and the derivative of z' by the logit."""
    wide, shares = logit.double(), shares.to(logit.device)
    odds = (1 - shares) * wide.exp()
    return (wide + shares.log() - odds.log1p()).to(logit), (1 / (1 + odds)).to(logit)


def _grow_columns(weight: Tensor, digit: Digit) -> Tensor:
    """`[rows, n * C]` -> `[rows, n * size * C]`: the copies of a feature share its weight."""
    streams = weight.unflatten(1, (digit.stream.numel() // digit.size, -1))
    return (streams[:, digit.stream] / digit.size).flatten(1)


def _filled(new: Any, old: Any, values: dict[str, Tensor]) -> Any:
    """The new module with these values, and device, dtype and mode of the old one."""
    parameter = next(old.parameters())
    new.to(parameter.device, parameter.dtype).train(old.training)
    new.load_state_dict(values)
    for name, value in old.named_parameters():
        new.get_parameter(name).requires_grad_(value.requires_grad)
    return new
