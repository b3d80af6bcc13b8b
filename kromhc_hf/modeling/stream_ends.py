# Code of kromhc-hf, which travels with every model that it saves.
"""Learned ways to make streams from one hidden state and to join them again, one small module each."""

from math import log

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .hyper_connection import INITIAL_ALPHA, StreamModule, expand, read


class StreamExpansion(StreamModule):
    """Copies of the hidden state plus a learned embedding per stream; the embedding starts at 0, which is lossless.

    Args:
        hidden_size: C.
        num_streams: n; with one stream there is nothing to tell apart and the module has no parameters.
    """

    def __init__(self, hidden_size: int, num_streams: int, device: torch.device | str | None = None):
        super().__init__()
        self.num_streams = num_streams
        self.weight = _parameter(num_streams, hidden_size, device=device) if num_streams > 1 else None
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

    def __init__(self, hidden_size: int, num_streams: int, eps: float = 1e-6, device: torch.device | str | None = None):
        super().__init__()
        self.num_streams, self.eps = num_streams, eps
        if num_streams > 1:
            for name, shape in self.shapes(hidden_size, num_streams).items():
                self.register_parameter(name, _parameter(*shape, device=device))
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
            wide = streams.to(torch.promote_types(streams.dtype, torch.float32))
            return read(wide, self.weights(wide)).to(streams.dtype)


class SoftmaxReadout(StreamReadout):
    """One learned logit per stream, the same for all tokens."""

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
            # A zero alpha next to a zero weight would never train.
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


LEARNED_READOUTS: dict[str, type[StreamReadout]] = {
    "softmax": SoftmaxReadout,
    "sigmoid": SigmoidReadout,
    "attention": AttentionReadout,
}


def _parameter(*shape: int, device: torch.device | str | None) -> nn.Parameter:
    # The dtype is explicit because models are built under their own default dtype.
    return nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device))
