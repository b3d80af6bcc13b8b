# Code of kromhc-hf, which travels with every model that it saves.
"""Where streams begin and end: copies of one hidden state, joined again in one of the ways of the table `READOUTS`."""

from collections.abc import Callable
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .known_values import all_equal, may_look
from .mixing import snapped_sum
from .option_table import EPS
from .stream_module import INITIAL_ALPHA, StreamModule, new_parameter


def expand(hidden_states: Tensor, num_streams: int) -> Tensor:
    """Makes n equal streams: `[B, S, C]` -> `[B, S, n, C]`, a view."""
    return hidden_states.unsqueeze(-2).expand(*hidden_states.shape[:-1], num_streams, hidden_states.shape[-1])


def mean_of_streams(streams: Tensor) -> Tensor:
    """`[..., n, C]` -> `[..., C]`, accumulated in at least fp32; the mean of equal streams is bitwise that stream."""
    if may_look(streams) and not torch.is_grad_enabled() and all_equal(streams):
        return streams[..., 0, :].clone()
    wide = _widened(streams)
    first = wide[..., :1, :]
    return (first + (wide - first).mean(-2, keepdim=True)).squeeze(-2).to(streams.dtype)


def sum_of_streams(streams: Tensor) -> Tensor:
    """`[..., n, C]` -> `[..., C]`, accumulated in at least fp32."""
    return _widened(streams).sum(-2).to(streams.dtype)


def read(streams: Tensor, weights: Tensor) -> Tensor:
    """`sum_j weights[j] streams[j]`: `[..., n, C]` and `[..., n]` -> `[..., C]`.

    Written as `total * first + sum_j weights[j] (streams[j] - first)`: where the streams are equal and the weights sum
    to 1, up to 4 eps of rounding, the result is bitwise that stream.
    """
    first = streams[..., :1, :]
    rest = weights[..., 1:].unsqueeze(-1) * (streams[..., 1:, :] - first)
    return snapped_sum(weights) * first.squeeze(-2) + rest.sum(-2)


def _widened(streams: Tensor) -> Tensor:
    return streams.to(torch.promote_types(streams.dtype, torch.float32))


class StreamExpansion(StreamModule):
    """Copies of the hidden state plus a learned embedding per stream; the embedding starts at 0, which is lossless.

    Args:
        hidden_size: C.
        num_streams: n; with one stream there is nothing to tell apart and the module has no parameters.
    """

    def __init__(self, hidden_size: int, num_streams: int, device: torch.device | str | None = None):
        super().__init__()
        self.num_streams = num_streams
        self.weight = new_parameter(num_streams, hidden_size, device=device) if num_streams > 1 else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            init.zeros_(self.weight)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, S, C]` -> `[B, S, n, C]`."""
        streams = expand(hidden_states, self.num_streams)
        return streams if self.weight is None else (streams + self.weight).to(hidden_states.dtype)


class StreamReadout(StreamModule):
    """The weighted sum of the streams, with learned weights that start at 1/n: equal streams pass bitwise.

    Args:
        hidden_size: C.
        num_streams: n; with one stream the module has no parameters.
        eps: added to the mean square in the norm of the streams.
    """

    # Whether the weights depend on the streams, behind a norm.
    normed = True

    def __init__(self, hidden_size: int, num_streams: int, eps: float = EPS, device: torch.device | str | None = None):
        super().__init__()
        self.num_streams, self.eps = num_streams, eps
        if num_streams > 1:
            for name, shape in self.shapes(hidden_size, num_streams).items():
                self.register_parameter(name, new_parameter(*shape, device=device))
            self.reset_parameters()

    @staticmethod
    def shapes(hidden_size: int, num_streams: int) -> dict[str, tuple[int, ...]]:
        """The parameters by name."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            init.zeros_(parameter)

    def weights(self, streams: Tensor) -> Tensor:
        """The weight of each stream, `[..., n, C]` -> `[..., n]` or `[n]`."""
        raise NotImplementedError

    def forward(self, streams: Tensor) -> Tensor:
        """`[B, S, n, C]` -> `[B, S, C]`."""
        if self.num_streams == 1:
            return streams.squeeze(-2)
        with torch.autocast(streams.device.type, enabled=False):
            wide = _widened(streams)
            return read(wide, self.weights(wide)).to(streams.dtype)


class SoftmaxReadout(StreamReadout):
    """One learned logit per stream, the same for all tokens."""

    normed = False
    bias: nn.Parameter

    @staticmethod
    def shapes(hidden_size: int, num_streams: int) -> dict[str, tuple[int, ...]]:
        return {"bias": (num_streams,)}

    def weights(self, streams: Tensor) -> Tensor:
        return torch.softmax(self.bias, dim=-1)


class SigmoidReadout(StreamReadout):
    """Weights predicted like the read weights of a hyper-connection: `sigmoid(alpha * weight x' + bias)`.

    They need not sum to 1.
    """

    bias: nn.Parameter
    weight: nn.Parameter
    alpha: nn.Parameter

    @staticmethod
    def shapes(hidden_size: int, num_streams: int) -> dict[str, tuple[int, ...]]:
        return {"bias": (num_streams,), "weight": (num_streams, num_streams * hidden_size), "alpha": (1,)}

    def reset_parameters(self) -> None:
        if self.num_streams > 1:
            init.constant_(self.bias, -log(self.num_streams - 1))
            init.zeros_(self.weight)
            init.constant_(self.alpha, INITIAL_ALPHA)

    def weights(self, streams: Tensor) -> Tensor:
        features = streams.flatten(-2)
        scale = torch.rsqrt(features.square().mean(-1, keepdim=True) + self.eps)
        return torch.sigmoid(self.alpha * scale * nn.functional.linear(features, self.weight) + self.bias)


class AttentionReadout(StreamReadout):
    """Attention of one learned query over the streams: softmax over j of `weight . RMSNorm(streams[j])`."""

    weight: nn.Parameter

    @staticmethod
    def shapes(hidden_size: int, num_streams: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (hidden_size,)}

    def weights(self, streams: Tensor) -> Tensor:
        scale = torch.rsqrt(streams.square().mean(-1) + self.eps)
        return torch.softmax((streams @ self.weight) * scale, dim=-1)


@dataclass(frozen=True)
class Readout:
    """One way to join the streams.

    Args:
        join: the function that does it where nothing is learned, `[..., n, C]` -> `[..., C]`.
        module: the learned module that does it instead, in the last layer.
        sums_to_one: whether its weights sum to 1, those of a module at the start: equal streams then pass unchanged.
        after_norm: whether it follows the model's final norm, which is then applied to every stream.
    """

    join: Callable[[Tensor], Tensor] = mean_of_streams
    module: type[StreamReadout] | None = None
    sums_to_one: bool = True
    after_norm: bool = False


READOUTS: dict[str, Readout] = {
    "mean": Readout(),
    "sum": Readout(sum_of_streams, sums_to_one=False),
    "norm_sum": Readout(sum_of_streams, sums_to_one=False, after_norm=True),
    "softmax": Readout(module=SoftmaxReadout),
    "sigmoid": Readout(module=SigmoidReadout),
    "attention": Readout(module=AttentionReadout),
}
