from unittest.mock import Mock

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from support.connected import LEARNED_READOUTS, connected, tiny_llama
from support.tiny import token_ids
from torch.nn.utils import parametrize

from kromhc_hf import KromHCForCausalLM, apply_hyper_connections, grow_streams, growing


READOUTS = ["mean", *LEARNED_READOUTS]


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize(("num_streams", "factor"), [(2, 2), (3, 2), (2, 3), (4, 4)])
def test_growing_an_untrained_model_is_exact(num_streams: int, factor: int, readout: str) -> None:
    model = connected(num_streams=num_streams, readout=readout, stream_embedding=True)
    growth = grow_streams(model, factor)
    assert growth == (num_streams, num_streams * factor, 0.0)
    assert model.config.hc_num_streams == num_streams * factor


@pytest.mark.parametrize("readout", ["mean", "softmax", "attention"])
@pytest.mark.parametrize(("num_streams", "factor"), [(2, 2), (3, 2), (2, 3), (4, 4)])
def test_growing_static_mappings_is_exact_up_to_rounding(num_streams: int, factor: int, readout: str) -> None:
    model = connected(0.5, num_streams=num_streams, readout=readout, stream_embedding=True, dynamic=False)
    # Logits of order .1, hidden states of order 10, fp32: a few ulps of the sums.
    assert grow_streams(model, factor).max_difference < 1e-6


def dynamic_growth(size: float, kept: float) -> float:
    """What growing changes in a model whose dynamic mappings have weights of this size."""
    model = connected()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "_hc.weight" in name:
            parameter.data.normal_(std=size)
        if "_hc.alpha" in name:
            parameter.data.fill_(1.0)
    return grow_streams(model, kept=kept).max_difference


@pytest.mark.parametrize("fails", [False, True])
def test_growing_leaves_every_module_in_its_mode(fails: bool, monkeypatch) -> None:
    model = apply_hyper_connections(tiny_llama()).train()
    model.model.layers[0].mlp.eval()
    before = {name: module.training for name, module in model.named_modules()}
    if fails:
        monkeypatch.setattr(growing, "_probe", Mock(side_effect=RuntimeError("no memory")))
        with pytest.raises(RuntimeError, match="no memory"):
            grow_streams(model)
        assert model.config.hc_num_streams == 4
    else:
        grow_streams(model)
    after = {name: module.training for name, module in model.named_modules()}
    assert {name: after[name] for name in before} == before
    assert all(after[name] for name in after.keys() - before.keys())


def wrapped(model) -> None:
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["attn_hc", "ffn_hc"]))


def parametrised(model) -> None:
    parametrize.register_parametrization(model.model.layers[2].attn_hc, "bias", torch.nn.Identity())


@pytest.mark.parametrize("change", [wrapped, parametrised, cpu_offload])
def test_what_cannot_be_grown_is_left_as_it_is(change) -> None:
    model = apply_hyper_connections(tiny_llama())
    change(model)
    tokens = token_ids(model.config)
    before = model(tokens).logits
    with pytest.raises(ValueError, match="Grow the model before PEFT, parametrisations, sharding or offloading"):
        grow_streams(model)
    assert model.config.hc_num_streams == 4
    assert torch.equal(model(tokens).logits, before)


def test_growing_dynamic_mappings_errs_in_second_order() -> None:
    # Halving the dynamic part leaves a quarter of the error, and the share that is given away scales it.
    assert 0 < dynamic_growth(0.05, 0.75) < 0.4 * dynamic_growth(0.1, 0.75) < 1e-2
    assert 0 < dynamic_growth(0.1, 0.99) < 0.1 * dynamic_growth(0.1, 0.75)


def test_grown_model_trains_and_saves(tmp_path) -> None:
    model = connected(0.2, readout="sigmoid").train()
    model.model.layers[0].attn_hc.requires_grad_(False)
    grow_streams(model)
    assert model.training
    assert not model.model.layers[0].attn_hc.weight.requires_grad
    hyper_connection = model.model.layers[2].ffn_hc
    assert hyper_connection.weight.shape == (8 + 8 + 3, 8 * 32)
    ids = token_ids(model.config)
    model(ids, labels=ids).loss.backward()
    # Copies that were read alike would receive equal gradients and never separate.
    gradient = hyper_connection.bias.grad[:8].reshape(2, 4)
    assert (gradient[0] - gradient[1]).abs().max() > 0
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(KromHCForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("options", "factor", "message"),
    [
        ({"variant": "mhc"}, 2, r"only models of variant 'kromhc'.*got variant 'mhc' with 4 streams"),
        ({"num_streams": 1}, 2, r"at least 2 streams.*with 1 streams"),
        ({"init": "paper", "readout": "sum"}, 2, r"readout 'sum' would multiply the final hidden state by 2"),
        ({}, 1, r"factor must be an int of at least 2; got 1\. Use factor=2"),
        ({}, 7, r"no prime factor above 5"),
    ],
)
def test_growing_refusals(options: dict, factor: int, message: str) -> None:
    model = connected(**options)
    before = model.config.hc_num_streams
    with pytest.raises(ValueError, match=message):
        grow_streams(model, factor)
    assert model.config.hc_num_streams == before


def test_growing_needs_streams_and_a_share() -> None:
    with pytest.raises(ValueError, match="model must have hyper-connections to grow"):
        grow_streams(tiny_llama())
    with pytest.raises(ValueError, match=r"kept must lie between 0 and 1, both excluded; got 1"):
        grow_streams(connected(), kept=1)
