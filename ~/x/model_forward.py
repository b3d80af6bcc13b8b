# Code of kromhc-hf, which travels with every model that it saves.
"""The forward of the models around the decoder layers: in what it returns, the streams are read out."""

import functools
from collections.abc import Callable
from typing import Any

from .arrangement import arrange, connected_layer
from .decoder_layer import HyperConnectedLayer
from .layer_spec import attribute
from .stream_ends import sum_of_streams


def with_readout(backbone_forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's forward whose recorded hidden states are read out, `[B, S, n, C]` -> `[B, S, C]`."""

    # Trainer, generate and pipelines read the signature.
    @functools.wraps(backbone_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.hc_layers_path is not None:
            arrange(attribute(self, self.hc_layers_path), self.config)
        # Always a dict inside: in a bare tuple, streams [B, S, n, C] and attentions [B, H, S, S] look the same.
        return_dict = kwargs.pop("return_dict", None)
        outputs = backbone_forward(self, *args, return_dict=True, **kwargs)
        if getattr(outputs, "hidden_states", None) is not None:
            connected = [m for m in self.modules() if isinstance(m, HyperConnectedLayer) and m.hc_options]
            outputs["hidden_states"] = tuple(
                connected[-1].read_out(h) if h is not None and h.dim() == 4 else h for h in outputs.hidden_states
            )
        if self.hc_layers_path is not None:
            last = connected_layer(attribute(self, self.hc_layers_path)[-1])
            if last is not None and last.reads_out_after_norm():
                _sum_normed_streams(outputs, last.hc_options.num_streams)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return outputs if return_dict else outputs.to_tuple()

    return forward


def _sum_normed_streams(outputs: Any, num_streams: int) -> None:
    """Sums the streams of a base model's output after the final norm, in place."""
    normed = outputs.last_hidden_state
    # [B, S, n, C], or [B * n, S, C] with the same order in memory where the model restores its input's shape.
    length = normed.shape[1]
    outputs["last_hidden_state"] = sum_of_streams(normed.reshape(-1, length, num_streams, normed.shape[-1]))
    if getattr(outputs, "hidden_states", None) is not None:
        outputs["hidden_states"] = (*outputs.hidden_states[:-1], outputs.last_hidden_state)
