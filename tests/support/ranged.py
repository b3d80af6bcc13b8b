"""A llama of six layers, some of them with streams."""

import torch
from support.tiny import configurations, make_model, separate_streams, token_ids

from kromhc_hf import apply_hyper_connections
from kromhc_hf.modeling.connection_plan import find_decoder
from kromhc_hf.modeling.decoder_layer import HyperConnectedLayer


def six_layers():
    config = configurations("llama")[0]
    config.num_hidden_layers = 6
    return make_model(config)


def ranged(layers=(2, 4), **options):
    """Six layers of which some have streams that differ."""
    torch.manual_seed(0)
    model = apply_hyper_connections(six_layers(), layers=layers, **options)
    separate_streams(model)
    return model


def logits(model, **arguments):
    with torch.no_grad():
        return model(input_ids=token_ids(model.config), use_cache=False, **arguments).logits


def connected_positions(model) -> list[int]:
    return [i for i, layer in enumerate(find_decoder(model).layers) if isinstance(layer, HyperConnectedLayer)]
