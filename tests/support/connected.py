"""Tiny llamas with hyper-connections."""

import torch
from support.tiny import configurations, make_model

from kromhc_hf import apply_hyper_connections
from kromhc_hf.modeling.stream_ends import READOUTS


# Name and module of the readouts that learn.
LEARNED_READOUTS = {name: readout.module for name, readout in READOUTS.items() if readout.module is not None}


def tiny_llama(dtype: torch.dtype = torch.float32):
    return make_model(configurations("llama")[0], dtype)


def connected(randomness: float = 0.0, dtype: torch.dtype = torch.float32, num_streams: int = 4, **options):
    """A tiny llama with hyper-connections, their parameters moved away from the init by `randomness`."""
    model = apply_hyper_connections(tiny_llama(dtype), num_streams, **options)
    for name, parameter in model.named_parameters():
        if "_hc." in name:
            parameter.data.add_(torch.randn_like(parameter) * randomness)
    return model
