"""Whole models with every variant, readout and stream embedding; counts, growth and import of official weights."""

import pytest
import torch
from support.connected import LEARNED_READOUTS, connected, tiny_llama
from support.tiny import token_ids

from kromhc_hf import (
    HyperConnection,
    KromHCForCausalLM,
    apply_hyper_connections,
    count_parameters,
    remove_hyper_connections,
)
from kromhc_hf.modeling.variants import VARIANTS


READOUTS = ["mean", *LEARNED_READOUTS]


def parameter_total(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_identity_init_is_bitwise_lossless_in_a_model(variant: str, dtype: torch.dtype) -> None:
    for readout in READOUTS:
        model = tiny_llama(dtype)
        keys, ids = set(model.state_dict()), token_ids(model.config)
        with torch.no_grad():
            expected = model(ids, output_hidden_states=True)
            apply_hyper_connections(model, 3, variant, readout=readout, stream_embedding=True)
            found = model(ids, output_hidden_states=True)
        assert torch.equal(found.logits, expected.logits)
        assert all(torch.equal(a, b) for a, b in zip(found.hidden_states, expected.hidden_states, strict=True))
        remove_hyper_connections(model)
        assert set(model.state_dict()) == keys
        assert torch.equal(model(ids).logits, expected.logits)


@pytest.mark.parametrize("readout", ["norm_sum", *READOUTS])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_trained_model_survives_saving(variant: str, readout: str, tmp_path) -> None:
    init = "paper" if readout == "norm_sum" else "identity"
    options = {"variant": variant, "readout": readout, "stream_embedding": True, "sinkhorn_iterations": 7, "init": init}
    model = connected(0.3, **options)
    ids = token_ids(model.config)
    expected = model(ids, output_hidden_states=True)
    model.save_pretrained(tmp_path)
    loaded = KromHCForCausalLM.from_pretrained(tmp_path)
    found = loaded(ids, output_hidden_states=True)
    assert torch.equal(found.logits, expected.logits)
    assert {h.shape for h in found.hidden_states} == {(*ids.shape, 32)}
    assert loaded.config.hc_sinkhorn_iterations == 7


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_parameter_learns(variant: str) -> None:
    for readout in LEARNED_READOUTS:
        model = connected(0.1, variant=variant, readout=readout, stream_embedding=True)
        ids = token_ids(model.config)
        model(ids, labels=ids).loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad.abs().max() > 0, name


def test_streams_separate_from_the_identity_init() -> None:
    model = connected(readout="attention", stream_embedding=True)
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if "_hc." in n], lr=1e-2)
    ids = token_ids(model.config)
    losses = []
    for _ in range(6):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    streams = []
    model.model.layers[1].attn_hc.register_forward_pre_hook(lambda _, args: streams.append(args[0]))
    model(ids)
    assert (streams[0] - streams[0].mean(-2, keepdim=True)).abs().max() > 1e-3


def test_learned_readout_refuses_an_early_exit() -> None:
    model = connected(readout="softmax")
    ids = token_ids(model.config)
    model.config.num_hidden_layers = 2
    with pytest.raises(ValueError, match=r"readout 'softmax' must be used with all 2 layers.*Use readout='mean'"):
        model(ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"readout": "max"}, r"readout must be one of mean, sum, norm_sum, softmax, sigmoid, attention; got 'max'"),
        ({"readout": "norm_sum"}, r"readout weights sum to 1; got readout 'norm_sum'"),
        ({"variant": "mhc_lite", "num_streams": 8}, r"would take 247,818,240 parameters per branch"),
        ({"variant": "mhc", "sinkhorn_iterations": 0}, r"sinkhorn_iterations must be an int of at least 1; got 0"),
        ({"stream_embedding": 1}, r"^stream_embedding must be of type bool; got 1"),
    ],
)
def test_refusals_leave_the_model_alone(options: dict, message: str) -> None:
    model = tiny_llama()
    kind, keys = type(model), list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        apply_hyper_connections(model, **options)
    assert type(model) is kind
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_counts_equal_the_modules(variant: str) -> None:
    for dynamic in (True, False):
        for n in (1, 2, 3, 4, 6):
            module = HyperConnection(24, n, variant=variant, dynamic=dynamic)
            assert count_parameters(24, n, variant, dynamic=dynamic) == parameter_total(module)
    base = parameter_total(tiny_llama())
    for readout in READOUTS:
        for embedding in (True, False):
            added = parameter_total(connected(variant=variant, readout=readout, stream_embedding=embedding)) - base
            assert added == count_parameters(
                32, 4, variant, num_branches=6, readout=readout, stream_embedding=embedding
            )


@pytest.mark.parametrize(
    ("variant", "num_streams", "millions"),
    [
        *(("kromhc", n, millions) for n, millions in ((2, 0.26), (4, 0.96), (8, 3.39), (16, 12.09))),
        *(("mhc", n, millions) for n, millions in ((2, 0.33), (4, 1.84), (8, 11.95), (16, 85.2))),
        *(("mhc_lite", n, millions) for n, millions in ((2, 0.26), (4, 2.43), (8, 5.9e3))),
    ],
)
def test_published_counts(variant: str, num_streams: int, millions: float) -> None:
    count = count_parameters(768, num_streams, variant, num_branches=24, published=True)
    # The figures are given with two digits after the point, or three in all.
    assert count / 1e6 == pytest.approx(millions, abs=0.005, rel=0.01 if millions > 50 else 0)


def test_published_counts_to_the_thousand() -> None:
    counts = [count_parameters(768, 4, v, num_branches=24, published=True) for v in ("kromhc", "mhc", "mhc_lite")]
    assert [count // 1000 for count in counts] == [958, 1843, 2433]
    assert [round(count / 1000) for count in counts] == [959, 1844, 2434]


def test_kromhc_needs_fewer_parameters_than_published() -> None:
    for n in (2, 4, 8, 16):
        ours = count_parameters(768, n, num_branches=24)
        assert ours < 0.9 * count_parameters(768, n, num_branches=24, published=True)
    assert count_parameters(768, 4, num_branches=24) == 737592
    with pytest.raises(ValueError, match="published counts the official modules"):
        count_parameters(768, 4, dynamic=False, published=True)
    with pytest.raises(ValueError, match=r"variant must be one of kromhc, mhc, mhc_lite, hc; got 'tbp'"):
        count_parameters(768, 4, "tbp", published=True)
