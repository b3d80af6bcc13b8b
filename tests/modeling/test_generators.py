"""The weight of the mappings as factors of low rank, against the sum of products that they stand for."""

import pytest
import torch
from support.connected import connected, learns_and_survives_saving, tiny_llama
from support.tiny import token_ids

from kromhc_hf import (
    HyperConnection,
    apply_hyper_connections,
    count_parameters,
    grow_streams,
)
from kromhc_hf.modeling.kernels_eager import connect, project_reference
from kromhc_hf.modeling.variants import VARIANTS


FACTORED = [name for name, kind in VARIANTS.items() if kind.plain_gates]


def randomised(variant: str, num_streams: int, rank: int, **options) -> HyperConnection:
    """A float64 module whose every parameter is random."""
    module = HyperConnection(6, num_streams, variant=variant, generator="cp", generator_rank=rank, **options).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return module


def weight_by_hand(module: HyperConnection, rank: int) -> torch.Tensor:
    """sum_r outputs[r, k] streams[g, r, j] features[g, r, c], entry by entry."""
    outputs, streams, features = (module.get_parameter(name) for name in module.weight_shapes)
    n, rows, k = module.num_streams, [], 0
    for group, size in enumerate(size for size in module.mixing.sizes if size):
        for _ in range(size):
            row = [
                sum(outputs[r, k] * streams[group, r, j] * features[group, r, c] for r in range(rank))
                for j in range(n)
                for c in range(6)
            ]
            rows.append(torch.stack(row))
            k += 1
    return torch.stack(rows)


@pytest.mark.parametrize("kernel", ["torch", "reference"])
@pytest.mark.parametrize(("variant", "num_streams", "rank"), [("kromhc", 4, 2), ("identity", 3, 1), ("mhc", 2, 3)])
def test_factors_are_the_sum_of_their_products(variant: str, num_streams: int, rank: int, kernel: str) -> None:
    module = randomised(variant, num_streams, rank, kernel=kernel)
    # More tokens than take the path of the few.
    streams = torch.randn(1, 20, num_streams, 6, dtype=torch.float64)
    cotangent = torch.randn_like(streams)

    def run(forward) -> list[torch.Tensor]:
        branch_input, write = forward(streams)
        out = write(torch.tanh(branch_input))
        gradients = torch.autograd.grad(out, list(module.parameters()), cotangent)
        return [branch_input, out, *gradients]

    found = run(module)
    by_hand = weight_by_hand(module, rank)
    arguments = (by_hand, module.bias, module.alpha, module.mixing, module.eps)
    # Float64, sums of at most 64 terms of order 1 to 10.
    for one, other in zip(found, run(lambda x: connect(x, *arguments)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    products, _ = project_reference(streams, module._weight(streams.dtype), module.eps)
    torch.testing.assert_close(products, streams.flatten(-2) @ by_hand.T, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", FACTORED)
def test_identity_init_is_bitwise_lossless(variant: str, dtype: torch.dtype) -> None:
    module = HyperConnection(8, 3, variant=variant, generator="cp", branch_index=1)
    streams = torch.randn(2, 20, 1, 8).to(dtype).expand(-1, -1, 3, -1)
    branch_input, write = module(streams)
    assert torch.equal(branch_input, streams[:, :, 0])
    branch_output = torch.randn(2, 20, 8).to(dtype)
    assert torch.equal(write(branch_output), streams + branch_output.unsqueeze(-2))


def test_starts_the_same_in_every_run_and_leaves_the_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (HyperConnection(8, 4, generator="cp", branch_index=i).state_dict() for i in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not first["weight_outputs"].any()
    assert not torch.equal(first["weight_features"], other["weight_features"])
    torch.set_default_dtype(torch.float64)
    try:
        wide = HyperConnection(8, 4, generator="cp", branch_index=3).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(first[name], wide[name]) and wide[name].dtype == torch.float32 for name in first)


@pytest.mark.parametrize("variant", FACTORED)
def test_counts_are_those_of_the_paper(variant: str) -> None:
    for n, rank in ((2, 1), (4, 2)):
        logits = VARIANTS[variant].count_logits(n)
        weight = 2 * rank * (2 * n + 24) + (rank * (n + 24 + logits) if logits else 0)
        module = HyperConnection(24, n, variant=variant, generator="cp", generator_rank=rank)
        expected = weight + 2 * n + logits + 3
        assert sum(parameter.numel() for parameter in module.parameters()) == expected
        assert count_parameters(24, n, variant, generator="cp", generator_rank=rank) == expected


def test_a_model_learns_and_survives_saving(tmp_path) -> None:
    model = connected(0.1, generator="cp", generator_rank=3)
    learns_and_survives_saving(model, tmp_path)
    ids = token_ids(model.config)
    # From its start, through the output factors first.
    fresh = connected(generator="cp")
    optimizer = torch.optim.AdamW([p for n, p in fresh.named_parameters() if "_hc." in n], lr=1e-2)
    for _ in range(3):
        fresh(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(layer.attn_hc.weight_outputs.abs().max() > 1e-3 for layer in fresh.model.layers)


def test_refusals_name_rule_value_and_way_out() -> None:
    for options, message in (
        (
            {"variant": "hc", "generator": "cp"},
            r"generator must be 'dense' for .* 'hc'.*got 'cp'. Use generator='dense'",
        ),
        ({"generator": "tucker"}, r"generator must be one of dense, cp; got 'tucker'"),
        ({"generator": "cp", "generator_rank": 0}, r"generator_rank must be at least 1; got 0. The default is 2"),
        ({"generator_rank": 2.5}, r"generator_rank must be of type int; got 2.5"),
    ):
        model = tiny_llama()
        with pytest.raises(ValueError, match=message):
            apply_hyper_connections(model, **options)
        assert type(model) is type(tiny_llama())
    with pytest.raises(ValueError, match=r"only models with generator 'dense' and .* can be grown.*got 'cp'"):
        grow_streams(connected(generator="cp"))
    with pytest.raises(ValueError, match=r"published counts the official modules.*generator='cp'"):
        count_parameters(24, generator="cp", published=True)
