"""Tiny llamas with hyper-connections."""

from pathlib import Path

import torch
from support.tiny import configurations, make_model, token_ids

from kromhc_hf import KromHCForCausalLM, apply_hyper_connections
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


def same_gradients_checkpointed(model) -> dict[str, torch.Tensor]:
    """The gradients of a model in training, which must be the same bits with gradient checkpointing; by parameter."""
    ids = token_ids(model.config)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain = gradients()
    model.gradient_checkpointing_enable()
    checkpointed = gradients()
    assert all(torch.equal(checkpointed[name], plain[name]) for name in plain)
    return plain


def learns_and_survives_saving(model, folder: Path) -> None:
    """Every parameter of a model must get a gradient, and it must compute the same bits once saved and loaded."""
    ids = token_ids(model.config)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    model.save_pretrained(folder)
    loaded = KromHCForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@torch.no_grad()
def assert_as_right(model, ids: torch.Tensor, logits: torch.Tensor) -> None:
    """The model computes what these logits in fp32 were once rounded from.

    Both are roundings of the logits in fp64, by as many operations but not the same ones, so neither is much nearer: of
    two layers with two branches each, 16 in a row that read, normalise, compute and write. Leaves the model in fp64.
    """
    found = model.eval()(ids).logits
    exact = model.double()(ids).logits
    error, eps = (logits - exact).abs().max(), torch.finfo(logits.dtype).eps
    assert error <= 16 * eps * logits.abs().max()
    assert (found - exact).abs().max() <= 2 * error
