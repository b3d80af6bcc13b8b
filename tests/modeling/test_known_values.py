"""What is known of values on a CPU: streams that are equal and stay so, and small tensors that are made once."""

from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kromhc_hf import HyperConnection
from kromhc_hf.modeling import kernels_eager, kernels_eager_passes, known_values, variants_permutations
from kromhc_hf.modeling.known_values import all_equal, number, number_tensor
from kromhc_hf.modeling.mixing import Mixing
from kromhc_hf.modeling.stream_ends import mean_of_streams
from kromhc_hf.modeling.variants import VARIANTS, make_mixing


TOKENS, STREAMS, WIDTH = 40, 4, 24  # too many tokens for the path of a handful


@pytest.fixture
def nothing_kept(monkeypatch) -> None:
    """Every tensor that is kept is made again, and what is made here is forgotten."""
    monkeypatch.setattr(known_values, "_KEPT", {})


def equal_streams() -> torch.Tensor:
    return torch.randn(2, TOKENS, 1, WIDTH).expand(-1, -1, STREAMS, -1).contiguous()


def connected(module: HyperConnection, streams: torch.Tensor) -> torch.Tensor:
    branch_input, write = module(streams)
    return write(torch.tanh(branch_input))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changed", ["nothing", "h_post", "streams", "rows"])
def test_equal_streams_have_the_same_bits_without_gradients(changed: str, dtype: torch.dtype) -> None:
    """The values are those with gradients, bit for bit, and each stream has memory of its own."""
    module = HyperConnection(WIDTH, STREAMS, variant="mhc" if changed == "rows" else "kromhc")
    streams = equal_streams().to(dtype)
    with torch.no_grad():
        if changed == "h_post":
            module.bias[STREAMS] += 1
        if changed == "streams":
            streams[1, 7, 2, 3] += 1
        found = connected(module, streams)
        again = connected(module, found)
        assert torch.equal(found[0, 0, 0], found[0, 0, 1]) == (changed != "h_post")
        found[:, :, 0] += 1
        assert not torch.equal(found[:, :, 0], found[:, :, 1])
    with_gradients = connected(module, streams)
    assert torch.equal(again, connected(module, with_gradients))


@pytest.mark.parametrize("equal", [True, False])
def test_equal_streams_take_less(equal: bool, monkeypatch) -> None:
    """One of them is projected, and nothing makes `h_res`."""
    module, streams = HyperConnection(WIDTH, STREAMS), equal_streams()
    if not equal:
        streams[0, 0, 0, 0] += 1
    project, matrix = mock.Mock(wraps=kernels_eager.project), mock.Mock(wraps=module.mixing.matrix)
    monkeypatch.setattr(kernels_eager, "project", project)
    monkeypatch.setattr(module.mixing, "matrix", matrix)
    with torch.no_grad():
        connected(module, streams)
    assert project.call_args.args[0].stride(1) == (0 if equal else WIDTH)
    assert matrix.called == (not equal)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_stream_that_stands_for_all_is_projected_once(variant: str) -> None:
    weight = torch.randn(make_mixing(variant, STREAMS).weight_shape(WIDTH)) / 8
    dense = equal_streams().flatten(0, 1)
    expanded = dense[:, :1].expand_as(dense)
    for found, exact in zip(
        kernels_eager_passes.project(expanded, weight, 1e-6), kernels_eager_passes.project(dense, weight, 1e-6)
    ):
        assert found.shape == exact.shape
        # Sums of at most n * C products of numbers of the size of 1.
        torch.testing.assert_close(found, exact, rtol=0, atol=STREAMS * WIDTH * torch.finfo(torch.float32).eps)


def test_looks_at_every_token() -> None:
    streams = equal_streams().flatten(0, 1)
    assert all_equal(streams)
    assert all_equal(streams[:1])
    assert all_equal(streams[:0])
    for token in (0, 1, TOKENS - 1):
        different = streams.clone()
        different[token, -1, -1] += 1
        assert not all_equal(different)


@pytest.mark.parametrize("num_streams", [2, 3, 5, 8])
@pytest.mark.parametrize("gradients", [False, True])
def test_the_mean_of_streams(gradients: bool, num_streams: int) -> None:
    """Of each token by itself; what comes out shares no memory with the streams."""
    one = torch.randn(2, TOKENS, 1, WIDTH)
    for streams in (one.expand(-1, -1, num_streams, -1), one.repeat(1, 1, num_streams, 1)):
        with torch.set_grad_enabled(gradients):
            found = mean_of_streams(streams)
            assert torch.equal(found, one.squeeze(2))
            found += 1
            assert torch.equal(streams, one.expand_as(streams))
            partly = torch.cat([torch.randn(2, 1, num_streams, WIDTH), streams], 1)
            mean = mean_of_streams(partly)
        assert torch.equal(mean[:, 1:], one.squeeze(2))
        torch.testing.assert_close(mean[:, 0], partly[:, 0].double().mean(1).float())


@pytest.mark.parametrize("values", ["equal", "different"])
def test_the_gradient_of_the_mean_reaches_every_stream(values: str) -> None:
    streams = equal_streams() if values == "equal" else torch.randn(2, TOKENS, STREAMS, WIDTH)
    cotangent = torch.randn(2, TOKENS, WIDTH)
    (found,) = torch.autograd.grad(mean_of_streams(streams.requires_grad_()), streams, cotangent)
    torch.testing.assert_close(found, (cotangent / STREAMS).unsqueeze(2).expand_as(found))


@pytest.mark.parametrize("variant", ["kromhc", "identity", "mhc"])
def test_factors_of_predictions(variant: str, monkeypatch) -> None:
    mixing, alpha = make_mixing(variant, STREAMS), torch.tensor([2.0, 3.0, 5.0])
    kept = mixing.by_output(alpha)
    monkeypatch.setattr("kromhc_hf.modeling.mixing.keeps", lambda beside: False)
    assert torch.equal(kept, Mixing.by_output(mixing, alpha))
    assert torch.equal(kept, torch.tensor([2.0] * 4 + [3.0] * 4 + [5.0] * mixing.num_logits))


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_token_is_computed_like_several(variant: str) -> None:
    module = HyperConnection(WIDTH, STREAMS, variant=variant).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    streams = torch.randn(1, 3, STREAMS, WIDTH, dtype=torch.float64)
    together = connected(module, streams)
    for index in range(3):
        token = streams[:, index : index + 1].clone().requires_grad_()
        torch.testing.assert_close(connected(module, token), together[:, index : index + 1])
    assert torch.autograd.gradcheck(lambda x: connected(module, x), token)
    assert torch.autograd.gradgradcheck(lambda x: connected(module, x), token)


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("tokens", [1, 3, TOKENS])
def test_what_is_made_in_inference_mode_serves_in_training(tokens: int) -> None:
    module, streams = HyperConnection(WIDTH, STREAMS), torch.randn(1, tokens, STREAMS, WIDTH)
    with torch.inference_mode():
        connected(module, streams)
    connected(module, streams).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_streams", [2, 4, 6, 8, 12, 16])
def test_factors_of_two_are_one_matrix(num_streams: int, dtype: torch.dtype, monkeypatch) -> None:
    """Without gradients patterns that are kept make `h_res`, with the bits of the product of matrices."""
    products = mock.Mock(side_effect=variants_permutations.kronecker)
    monkeypatch.setattr(variants_permutations, "kronecker", products)
    mixing = make_mixing("kromhc", num_streams)
    logits = torch.randn(2, TOKENS, mixing.num_logits, dtype=dtype)
    found = mixing.matrix(logits)
    assert products.call_count == len(mixing.factors) - mixing.twos
    assert torch.equal(found, mixing.matrix(logits.requires_grad_()))
    assert products.call_count == 2 * len(mixing.factors) - mixing.twos - 1


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("mode", ["fake", "grad", "vmap", "jvp", "forward"])
def test_what_belongs_to_a_mode_is_not_kept(mode: str) -> None:
    """Neither fake tensors nor those of a transform may be found outside of it."""
    module, streams = HyperConnection(WIDTH, STREAMS), torch.randn(1, 1, STREAMS, WIDTH)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)

    def run(streams: torch.Tensor) -> torch.Tensor:
        known_values.kept_indices(module.mixing.sizes)
        known_values.number_tensor(module.eps, torch.ones(1))
        return connected(module, streams).sum()

    if mode == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            run(fake.from_tensor(streams))
    elif mode == "forward":
        with torch.autograd.forward_ad.dual_level():
            run(torch.autograd.forward_ad.make_dual(streams, streams))
    elif mode == "jvp":
        torch.func.jvp(run, (streams,), (streams,))
    else:
        getattr(torch.func, mode)(run)(streams)
    assert not known_values._KEPT
    found = connected(module, streams)
    assert known_values._KEPT
    module.kernel = "reference"
    torch.testing.assert_close(found, connected(module, streams.repeat(1, TOKENS, 1, 1))[:, :1])


def test_a_tensor_without_values_gets_numbers() -> None:
    with torch.device("meta"):
        assert number(0.5, torch.ones(2)) == 0.5
        assert number_tensor(0.5, torch.ones(2)).is_meta
        assert number_tensor(0.5, torch.ones(2, device="cpu")).item() == 0.5


def test_the_dtype_is_that_of_the_neighbour() -> None:
    assert number_tensor(1e-6, torch.ones(1, dtype=torch.float64)).item() == 1e-6
    assert number_tensor(1e-6, torch.ones(1)).dtype == torch.float32
