import pytest
import torch
from support import reference
from support.connected import LEARNED_READOUTS
from torch import nn

from kromhc_hf import HyperConnection, doubly_stochastic_error
from kromhc_hf.modeling import kernels_eager
from kromhc_hf.modeling.stream_ends import StreamExpansion, read
from kromhc_hf.modeling.variants import VARIANTS


@pytest.fixture(autouse=True, params=[0, 16], ids=["spans", "few"])
def path(request, monkeypatch) -> None:
    """A handful of tokens takes a path of its own, and these tests have no more: both paths are tested."""
    monkeypatch.setattr(kernels_eager, "FEW_TOKENS", request.param)


SETTINGS = [
    *((variant, n) for variant in VARIANTS for n in (2, 3, 4)),
    ("kromhc", 6),
    ("kromhc", 8),
    ("tbp", 7),
]
# Those whose matrix learns and is doubly stochastic for any logits.
LEARNED_AND_EXACT = [
    name for name, kind in VARIANTS.items() if kind.doubly_stochastic == "exactly" and name != "identity"
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def label(case: tuple[str, int]) -> str:
    return f"{case[0]}-n{case[1]}"


def randomised(variant: str, num_streams: int, hidden_size: int = 6, **options) -> HyperConnection:
    """A float64 module whose every parameter is random."""
    module = HyperConnection(hidden_size, num_streams, variant=variant, **options).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.7)
    return module


def branch(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x.flip(-1) * 1.5)


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("case", SETTINGS, ids=label)
def test_agrees_with_the_definition_including_gradients(case: tuple[str, int], dynamic: bool) -> None:
    variant, n = case
    module = randomised(variant, n, dynamic=dynamic)
    twin = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    streams = torch.randn(2, 2, n, 6, dtype=torch.float64, requires_grad=True)
    copies = streams.detach().clone().requires_grad_()
    cotangent = torch.randn_like(streams)

    branch_input, write = module(streams)
    out = write(branch(branch_input))
    (out * cotangent).sum().backward()
    tokens = [reference.connection(variant, twin, token, branch, module.eps) for token in copies.flatten(0, 1)]
    expected = torch.stack([out for _, out in tokens]).unflatten(0, (2, 2))
    (expected * cotangent).sum().backward()

    # Float64, values of order 1 to 10, sums of at most 64 terms.
    tight = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(branch_input, torch.stack([x for x, _ in tokens]).unflatten(0, (2, 2)), **tight)
    torch.testing.assert_close(out, expected, **tight)
    torch.testing.assert_close(streams.grad, copies.grad, **tight)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, twin[name].grad, **tight)


@pytest.mark.parametrize("case", SETTINGS, ids=label)
def test_mappings_agree_with_the_definition(case: tuple[str, int]) -> None:
    variant, n = case
    module, streams = randomised(variant, n), torch.randn(1, 3, n, 6, dtype=torch.float64)
    parameters = dict(module.named_parameters())
    found = module.mappings(streams)
    for position, token in enumerate(streams[0]):
        expected = reference.mappings(variant, parameters, token, module.eps)
        for actual, wanted in zip(found, expected):
            torch.testing.assert_close(actual[0, position], wanted, rtol=0, atol=1e-12)
    # What is inspected is what is applied.
    _, write = module(streams)
    output = torch.randn(1, 3, 6, dtype=torch.float64)
    expected = found.h_res @ streams + found.h_post.unsqueeze(-1) * output.unsqueeze(-2)
    torch.testing.assert_close(write(output), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_streams", [2, 4, 8])
def test_kromhc_agrees_with_the_batched_twin(num_streams: int) -> None:
    module = randomised("kromhc", num_streams, 16)
    streams = torch.randn(2, 5, num_streams, 16, dtype=torch.float64)
    branch_input, write = module(streams)
    expected_input, expected = reference.eager_kromhc(dict(module.named_parameters()), streams, branch, module.eps)
    torch.testing.assert_close(branch_input, expected_input, rtol=0, atol=1e-12)
    torch.testing.assert_close(write(branch(branch_input)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("num_streams", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_identity_init_is_the_plain_residual_bitwise(variant: str, num_streams: int, dtype: torch.dtype) -> None:
    hidden, output = torch.randn(2, 9, 8, dtype=dtype), torch.randn(2, 9, 8, dtype=dtype)
    streams = hidden.unsqueeze(-2).expand(-1, -1, num_streams, -1)
    for branch_index in range(num_streams + 1):
        module = HyperConnection(8, num_streams, variant=variant, branch_index=branch_index, residual_logit=2.3)
        branch_input, write = module(streams)
        assert torch.equal(branch_input, hidden)
        expected = (hidden.float() + output.float()).to(dtype)
        assert torch.equal(write(output), expected.unsqueeze(-2).expand_as(streams))


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("init", ["identity", "paper"])
def test_init_does_not_depend_on_the_default_dtype(variant: str, init: str) -> None:
    expected = HyperConnection(8, 3, variant=variant, init=init, residual_logit=2.3).state_dict()
    torch.set_default_dtype(torch.bfloat16)
    try:
        state = HyperConnection(8, 3, variant=variant, init=init, residual_logit=2.3).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in expected.items():
        assert value.dtype == torch.float32
        assert torch.equal(state[name], value), name


def test_paper_init_has_the_published_numbers() -> None:
    h_pre, h_post, h_res = HyperConnection(8, 4, init="paper", branch_index=6).mappings(torch.randn(1, 1, 4, 8))
    assert h_pre.sum().item() == pytest.approx(1.54, abs=0.005)
    assert h_post.mean().item() == pytest.approx(0.77, abs=0.005)
    assert h_pre.argmax().item() == h_post.argmax().item() == 2
    assert h_res.diagonal(dim1=-2, dim2=-1).min() > 0.999


def test_hc_paper_init_reads_one_stream() -> None:
    h_pre, h_post, h_res = HyperConnection(8, 4, variant="hc", init="paper", branch_index=5).mappings(
        torch.randn(1, 1, 4, 8)
    )
    assert h_pre.flatten().tolist() == [0, 1, 0, 0]
    assert h_post.flatten().tolist() == [1, 1, 1, 1]
    assert torch.equal(h_res[0, 0], torch.eye(4))


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_one_stream_is_the_plain_residual_without_parameters(variant: str) -> None:
    module = HyperConnection(8, 1, variant=variant)
    assert list(module.parameters()) == []
    streams, output = torch.randn(2, 3, 1, 8), torch.randn(2, 3, 8)
    branch_input, write = module(streams)
    assert torch.equal(branch_input, streams[:, :, 0])
    assert torch.equal(write(output)[:, :, 0], streams[:, :, 0] + output)
    assert torch.equal(module.mappings(streams).h_res, torch.ones(2, 3, 1, 1))


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_static_mode_has_a_bias_only(variant: str) -> None:
    module = HyperConnection(8, 4, variant=variant, dynamic=False)
    assert [name for name, _ in module.named_parameters()] == ["bias"]
    first, second = module.mappings(torch.randn(2, 3, 4, 8)), module.mappings(torch.randn(2, 3, 4, 8))
    assert first.h_res.shape == (2, 3, 4, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("make", [HyperConnection, *LEARNED_READOUTS.values(), StreamExpansion])
def test_parameters_stay_in_at_least_float32(make) -> None:
    module = make(8, 4)
    before = {name: p.clone() for name, p in module.named_parameters()}
    for convert in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to("cpu", torch.float16)):
        convert(module)
        for name, parameter in module.named_parameters():
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, before[name])
    assert {p.dtype for p in module.double().parameters()} == {torch.float64}
    narrow = {name: tensor.bfloat16() for name, tensor in before.items()}
    for assign in (False, True):
        module = make(8, 4)
        module.load_state_dict(narrow, assign=assign)
        assert all(p.dtype == torch.float32 for p in module.parameters())
        assert all(torch.equal(p, narrow[name].float()) for name, p in module.named_parameters())
    assert all(tensor.dtype == torch.bfloat16 for tensor in narrow.values())


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_autocast_does_not_reach_the_mappings(variant: str) -> None:
    module, streams = randomised(variant, 4).float(), torch.randn(2, 3, 4, 6)
    output = torch.randn(2, 3, 6)
    expected_input, write = module(streams)
    expected = write(output)
    with torch.autocast("cpu", torch.bfloat16):
        branch_input, write = module(streams)
        out = write(output)
    assert branch_input.dtype == out.dtype == torch.float32
    assert torch.equal(branch_input, expected_input)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("variant", LEARNED_AND_EXACT)
def test_stays_on_the_manifold_after_optimiser_steps(variant: str) -> None:
    module = HyperConnection(6, 4, variant=variant, residual_logit=1.0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    streams, target = torch.randn(4, 8, 4, 6), torch.randn(4, 8, 4, 6)
    start = module.mappings(streams).h_res.detach()
    for _ in range(20):
        branch_input, write = module(streams)
        (write(branch(branch_input)) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    h_res = module.mappings(streams).h_res
    assert (h_res - start).abs().max() > 0.05
    # Two Kronecker factors: 4 eps; the dense variants: half an eps.
    assert doubly_stochastic_error(h_res) <= 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("kernel", ["torch", "reference"])
@pytest.mark.parametrize("num_streams", [1, 4])
@pytest.mark.parametrize("tokens", [3, 40])
def test_a_branch_output_fits_like_in_a_plain_residual(kernel: str, num_streams: int, tokens: int) -> None:
    """What broadcasts is written, whatever the number of tokens; what would add to another token is refused."""
    connection = HyperConnection(24, num_streams, kernel=kernel)
    streams = torch.randn(2, tokens, num_streams, 24)
    for shape in ((1, tokens, 24), (2, 1, 24), (tokens, 24), (24,)):
        output = torch.randn(shape)
        _, write = connection(streams)
        assert torch.equal(write(output), write(output.expand(2, tokens, 24)))
    for shape in ((tokens, 2, 24), (2 * tokens, 24), (2, tokens, 12), (1, 2, tokens, 24), (2, tokens + 1, 24)):
        _, write = connection(streams)
        with pytest.raises(ValueError, match=rf"must have the shape of its input, \[2, {tokens}, 24\]"):
            write(torch.randn(shape))


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("kernel", ["torch", "reference"])
@pytest.mark.parametrize("shape", [(2, 40, 1, 24), (2, 40, 4, 12), (2, 40, 24)])
def test_streams_of_another_size_are_refused(dynamic: bool, kernel: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"streams must be \[B, S, n, C\] with n = 4 and C = 24"):
        HyperConnection(24, 4, dynamic=dynamic, kernel=kernel)(torch.randn(shape))


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_zero_and_huge_streams_stay_finite(variant: str) -> None:
    module = HyperConnection(6, 4, variant=variant)
    nn.init.normal_(module.weight)
    for scale in (0.0, 1e15):
        streams = (torch.randn(1, 2, 4, 6) * scale).requires_grad_()
        branch_input, write = module(streams)
        out = write(branch_input)
        out.sum().backward()
        assert out.isfinite().all()
        assert streams.grad.isfinite().all()


def test_read_weighs_unequal_streams() -> None:
    streams, h_pre = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.rand(2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(read(streams, h_pre), (h_pre.unsqueeze(-1) * streams).sum(-2), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((8, 0), {}, r"num_streams must be at least 1; got 0"),
        ((8, 7), {}, r"Use num_streams=8"),
        ((8, 4), {"variant": "mhc2"}, r"variant must be one of .*; got 'mhc2'"),
        ((8, 4), {"init": "zero"}, r"init must be one of identity, paper; got 'zero'"),
        ((8, 4), {"variant": "mhc", "sinkhorn_iterations": 0}, r"at least 1; got 0"),
    ],
)
def test_refusals(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HyperConnection(*arguments, **options)
