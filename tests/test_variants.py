"""Whole models with every variant, readout and stream embedding; counts, growth and import of official weights."""

import math

import pytest
import reference
import torch
from tiny import configurations, make_model, token_ids

from kromhc_hf import (
    HyperConnection,
    KromHCForCausalLM,
    apply_hyper_connections,
    count_parameters,
    doubly_stochastic_error,
    grow_streams,
    import_reference_checkpoint,
    import_reference_state_dict,
    remove_hyper_connections,
)
from kromhc_hf.mixing import VARIANTS
from kromhc_hf.reference import official_module
from kromhc_hf.stream_ends import LEARNED_READOUTS


READOUTS = ["mean", *LEARNED_READOUTS]


def tiny_llama(dtype: torch.dtype = torch.float32):
    return make_model(configurations("llama")[0], dtype)


def connected(randomness: float = 0.0, dtype: torch.dtype = torch.float32, num_streams: int = 4, **options):
    """A tiny llama with hyper-connections, their parameters moved away from the init by `randomness`."""
    model = apply_hyper_connections(tiny_llama(dtype), num_streams, **options)
    for name, parameter in model.named_parameters():
        if "_hc." in name:
            parameter.data.add_(torch.randn_like(parameter) * randomness)
    return model


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
        ({"stream_embedding": 1}, r"hc_stream_embedding must be of type bool; got 1"),
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


def official_state(variant: str, num_streams: int, hidden_size: int) -> dict[str, torch.Tensor]:
    shapes = official_module(variant).shapes(num_streams, hidden_size)
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("variant", "num_streams"),
    [*(("kromhc", n) for n in (2, 3, 4, 6, 8, 12)), *(("mhc_lite", n) for n in (2, 3, 4))],
)
def test_any_official_parameters_map_onto_ours_exactly(variant: str, num_streams: int) -> None:
    for _ in range(5):
        state = official_state(variant, num_streams, 6)
        module = import_reference_state_dict(state, variant=variant)
        streams = torch.randn(3, num_streams, 6, dtype=torch.float64)
        branch_input, write = module(streams)
        out = write(torch.tanh(branch_input))
        expected = [reference.official_connection(variant, state, token, torch.tanh) for token in streams]
        # Float64, values of order 10.
        torch.testing.assert_close(out, torch.stack(expected), rtol=0, atol=1e-11)
        assert sum(p.numel() for p in module.parameters()) < sum(tensor.numel() for tensor in state.values())


def test_official_parameters_in_float32_stay_float32() -> None:
    state = {name: tensor.float() for name, tensor in official_state("kromhc", 4, 6).items()}
    module = import_reference_state_dict(state)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert doubly_stochastic_error(module.mappings(torch.randn(5, 7, 4, 6)).h_res) <= 4 * torch.finfo(torch.float32).eps


def test_import_names_the_tensor_of_the_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"static_alpha must be of shape \(4, 5\) in a mhc module .*got \(8,\)"):
        import_reference_state_dict(official_state("kromhc", 4, 6), variant="mhc")
    with pytest.raises(ValueError, match=r"unknown: h_post_scale, pre_branch_scale, residual_scale"):
        import_reference_state_dict(official_state("mhc", 4, 6), variant="hc")


def official_gpt_state(variant: str, num_streams: int, size: int, num_layers: int) -> dict[str, torch.Tensor]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64) / math.sqrt(shape[-1])

    state = {"transformer.wte.weight": normal(31, size), "transformer.wpe.weight": normal(16, size)}
    for layer in range(num_layers):
        block = f"transformer.h.{layer}."
        state |= {
            block + "branch_attn.0.weight": normal(size) + 1,
            block + "branch_attn.1.c_attn.weight": normal(3 * size, size),
            block + "branch_attn.1.c_proj.weight": normal(size, size),
            block + "branch_mlp.0.weight": normal(size) + 1,
            block + "branch_mlp.1.c_fc.weight": normal(4 * size, size),
            block + "branch_mlp.1.c_proj.weight": normal(size, 4 * size),
        }
        for name in ("hc_attn.", "hc_mlp."):
            state |= {block + name + k: 0.3 * v for k, v in official_state(variant, num_streams, size).items()}
    return state | {"transformer.ln_f.weight": normal(size) + 1}


@pytest.mark.parametrize("variant", ["kromhc", "mhc_lite"])
def test_official_checkpoint_gives_the_same_logits(variant: str) -> None:
    state = official_gpt_state(variant, 4, 8, 2)
    ids = torch.randint(31, (2, 9))
    expected = torch.stack([reference.official_gpt(variant, state, row, 2, 2, 4) for row in ids])
    # As stored: tied head, compiled names, and each branch a second time inside its hyper-connection.
    stored = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
    stored["_orig_mod.lm_head.weight"] = state["transformer.wte.weight"]
    for name, tensor in state.items():
        stored["_orig_mod." + name.replace("branch_attn.", "hc_attn.branch.")] = tensor
    model = import_reference_checkpoint(stored, num_heads=2, variant=variant)
    outputs = model(ids, output_hidden_states=True)
    assert type(model).__name__ == "KromHCGPT2LMHeadModel"
    assert outputs.logits.dtype == torch.float64
    # Float64, two layers of values of order 10.
    torch.testing.assert_close(outputs.logits, expected, rtol=0, atol=1e-10)
    assert {h.shape for h in outputs.hidden_states} == {(2, 9, 8)}
    # One token at a time with a cache.
    cache, steps = None, []
    for position in range(9):
        step = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        steps.append(step.logits)
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=0, atol=1e-10)


def test_official_checkpoint_refusals() -> None:
    state = official_gpt_state("kromhc", 2, 8, 1)
    with pytest.raises(ValueError, match=r"unknown: extra\.weight"):
        import_reference_checkpoint({**state, "extra.weight": torch.zeros(1)}, num_heads=2)
    with pytest.raises(
        ValueError, match=r"every tensor of a block must belong to .*got 'transformer.h.0.mixer.weight'"
    ):
        import_reference_checkpoint({**state, "transformer.h.0.mixer.weight": torch.zeros(1)}, num_heads=2)
    with pytest.raises(ValueError, match="must have hyper-connections, hc_attn and hc_mlp in every block; found none"):
        import_reference_checkpoint({k: v for k, v in state.items() if ".hc_" not in k}, num_heads=2)


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
