"""The gated read against its equation, and everything around it."""

import pytest
import torch
from support.connected import connected, learns_and_survives_saving, tiny_llama
from support.tiny import token_ids

from kromhc_hf import HyperConnection, apply_hyper_connections, count_parameters, grow_streams


def branch_input_by_hand(module: HyperConnection, token: torch.Tensor) -> torch.Tensor:
    """sum_j h_pre[j] x_j + 1/n sum_i (2 sigmoid(W_u silu(W_d v))_i - 1) * x_i for one token `[n, C]`."""
    n, size = token.shape
    read = module.mappings(token[None, None]).h_pre[0, 0] @ token
    v = torch.cat([stream / (stream.square().mean() + module.eps).sqrt() for stream in token])
    hidden = module.read_down @ v
    gates = 2 / (1 + torch.exp(-(module.read_up @ (hidden / (1 + torch.exp(-hidden))))))
    return read + sum((gates[i * size : (i + 1) * size] - 1) * token[i] for i in range(n)) / n


@pytest.mark.parametrize("kernel", ["torch", "reference"])
@pytest.mark.parametrize("variant", ["identity", "kromhc", "hc"])
def test_agrees_with_its_equation_including_gradients(variant: str, kernel: str) -> None:
    module = HyperConnection(5, 3, variant=variant, read="gated", read_rank=2, kernel=kernel).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    # More tokens than take the path of the few.
    streams = torch.randn(1, 20, 3, 5, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(1, 20, 5, dtype=torch.float64)
    found = module(streams)[0]
    expected = torch.stack([branch_input_by_hand(module, token) for token in streams[0]])[None]
    # Float64, sums of at most 15 terms of order 1 to 10.
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    leaves = [streams, module.read_down, module.read_up, module.bias, module.weight, module.alpha]
    pairs = (torch.autograd.grad(value, leaves, cotangent, allow_unused=True) for value in (found, expected))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_with_even_read_weights_it_is_the_gated_residual() -> None:
    module = HyperConnection(5, 4, variant="identity", read="gated", read_rank=2).double()
    torch.nn.init.normal_(module.read_up)
    module.bias.data[:4] = torch.logit(torch.tensor(0.25))
    streams = torch.randn(1, 3, 4, 5, dtype=torch.float64)
    normed = torch.nn.functional.rms_norm(streams, (5,), eps=module.eps).flatten(-2)
    hidden = torch.nn.functional.silu(normed @ module.read_down.T)
    gates = 2 * torch.sigmoid(hidden @ module.read_up.T).unflatten(-1, (4, 5))
    # The read weights have passed through fp32.
    torch.testing.assert_close(module(streams)[0], (gates * streams).mean(-2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["identity", "kromhc", "orthogonal", "hc"])
def test_identity_init_is_bitwise_lossless(variant: str, dtype: torch.dtype) -> None:
    model = tiny_llama(dtype)
    ids = token_ids(model.config)
    with torch.no_grad():
        expected = model(ids).logits
        state = torch.get_rng_state()
        apply_hyper_connections(model, 3, variant, read="gated")
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(model(ids).logits, expected)
        with torch.autocast("cpu", torch.bfloat16):
            module, streams = model.model.layers[0].attn_hc, torch.randn(1, 20, 3, 32).to(dtype)
            torch.nn.init.normal_(module.read_up)
            inside = module(streams)[0]
        assert torch.equal(inside, module(streams)[0])


def test_a_model_learns_is_counted_and_survives_saving(tmp_path) -> None:
    model = connected(0.1, read="gated", read_rank=3, generator="cp")
    learns_and_survives_saving(model, tmp_path)
    for n, rank in ((2, 1), (4, 5)):
        gates = count_parameters(24, n, read="gated", read_rank=rank) - count_parameters(24, n)
        assert gates == 2 * rank * n * 24


def test_refusals_name_rule_value_and_way_out() -> None:
    for options, message in (
        ({"read": "gated", "dynamic": False}, r"read must be 'weights' for static mappings.*got 'gated'"),
        ({"read": "all"}, r"read must be one of weights, gated; got 'all'"),
        ({"read": "gated", "read_rank": 0}, r"read_rank must be at least 1; got 0. The default is 16"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_hyper_connections(tiny_llama(), **options)
    with pytest.raises(ValueError, match=r"read 'weights' can be grown.*got 'dense' and 'gated'"):
        grow_streams(connected(read="gated"))
    with pytest.raises(ValueError, match=r"published counts the official modules.*read='gated'"):
        count_parameters(24, read="gated", published=True)
