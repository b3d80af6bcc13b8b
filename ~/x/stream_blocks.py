# Code of kromhc-hf, which travels with every model that it saves.
"""Blocks of layers, the first streams of which are kept for the backward pass; torch is not imported."""

from math import sqrt
from typing import Any


CHOICES = ("none", "layer", "auto")


def read_recompute(value: Any) -> str | int:
    """The option `stream_recompute` as it is kept: one of its names, or the layers of a block as a number.

    Raises:
        ValueError: for anything else.
    """
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if value not in CHOICES and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
        raise ValueError(
            f"stream_recompute must be {', '.join(map(repr, CHOICES))} or the number of layers of a block, at least 1; "
            f"got {value!r}. The default is 'none'."
        )
    return number


def layers_of_block(value: Any, num_streams: int, num_layers: int) -> int:
    """How many layers share the streams that are kept; 0 where all are.

    "auto" is `sqrt(n L / (n + 2))`, where the least is alive at the peak: `n L / L_r` streams between blocks and
    `(n + 2) L_r` inside of one, per token and feature (mHC, section 4.3).

    Raises:
        ValueError: see `read_recompute`.
    """
    value = read_recompute(value)
    if value == "auto":
        return max(1, round(sqrt(num_streams * num_layers / (num_streams + 2))))
    return value if isinstance(value, int) else int(value == "layer")


def branches_of_block(layer: Any) -> int:
    """How many branches, from one of this decoder layer on, share the streams that are kept; 0 where all are.

    Raises:
        ValueError: if the layer is checkpointed as well, or see `read_recompute`.
    """
    config, options = layer.hc_config, layer.hc_options
    value = getattr(config, "hc_stream_recompute", options.stream_recompute)
    layers = layers_of_block(value, options.num_streams, layer.hc_last_layer - layer.hc_first_layer + 1)
    if layers > 0 and layer.training and getattr(layer, "gradient_checkpointing", False):
        raise ValueError(
            "stream_recompute must be 'none' with gradient checkpointing, which rebuilds whole layers and the streams "
            f"inside of them; got {value!r}. Set config.hc_stream_recompute = 'none' (stream_recompute of an adapter), "
            "or call model.gradient_checkpointing_disable()."
        )
    return layers * len(layer.spec.names)
