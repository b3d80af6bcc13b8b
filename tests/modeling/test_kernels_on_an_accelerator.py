"""The plain path as an accelerator without Triton takes it: its arithmetic, played on a CPU, and what it moves."""

from collections.abc import Callable

import pytest
import torch
from support import reference

from benchmarks import traffic
from kromhc_hf import HyperConnection
from kromhc_hf.modeling import kernels_eager, kernels_eager_passes
from kromhc_hf.modeling.variants import VARIANTS


EPS = torch.finfo(torch.bfloat16).eps


def with_wide_sums(product: Callable) -> Callable:
    """A product with the argument that it has on CUDA alone: factors in bf16, the result in fp32."""

    def run(left, right, *, out_dtype=None, **options):
        if out_dtype is None:
            return product(left, right, **options)
        assert left.dtype == right.dtype == torch.bfloat16
        return product(left.to(out_dtype), right.to(out_dtype))

    return run


@pytest.fixture(params=["sums in fp32", "sums in bf16"])
def accelerator(request, monkeypatch) -> None:
    """A CPU that takes streams in bf16 as an accelerator does."""
    monkeypatch.setattr(kernels_eager, "FEW_TOKENS", 0)
    monkeypatch.setattr(kernels_eager_passes, "narrow", lambda streams: streams.dtype == torch.bfloat16)
    wide = request.param == "sums in fp32"
    monkeypatch.setattr(kernels_eager_passes, "WIDE_SUMS", ("cpu",) if wide else ())
    monkeypatch.setattr(torch, "bmm", with_wide_sums(torch.bmm))


def randomised(num_streams: int, hidden_size: int = 96, **options) -> HyperConnection:
    module = HyperConnection(hidden_size, num_streams, **options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def results(connection: Callable, streams: torch.Tensor, parameters: dict, cotangent: torch.Tensor) -> dict:
    """The branch input, the new streams and every gradient."""
    leaves = {"streams": streams, **parameters}
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    branch_input, out = connection(**leaves)
    gradients = torch.autograd.grad(out, list(leaves.values()), cotangent)
    return {"branch_input": branch_input, "out": out} | dict(zip(leaves, gradients, strict=True))


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("num_streams", [2, 4, 8], ids="n{}".format)
@pytest.mark.parametrize("spans", [False, True], ids=["whole", "spans"])
def test_agrees_with_the_equations(num_streams: int, spans: bool, monkeypatch) -> None:
    module = randomised(num_streams)
    if spans:
        monkeypatch.setattr(kernels_eager_passes, "spans", lambda streams, dtype: [slice(0, 40), slice(40, 80)])

    def ours(streams, **parameters):
        def both(self, streams):
            branch_input, write = HyperConnection.forward(self, streams)
            return branch_input, write(torch.tanh(branch_input))

        monkeypatch.setattr(module, "forward", both.__get__(module))
        return torch.func.functional_call(module, parameters, (streams,))

    def equations(streams, **parameters):
        return reference.eager_kromhc(parameters, streams, torch.tanh, module.eps)

    streams, cotangent = (torch.randn(2, 33, num_streams, 96).bfloat16() for _ in range(2))
    parameters = dict(module.named_parameters())
    wide = {name: p.double() for name, p in parameters.items()}
    exact = results(equations, streams.double(), wide, cotangent.double())
    narrow = {name: p.bfloat16() for name, p in parameters.items()}
    plain = results(equations, streams, narrow, cotangent)
    for name, value in results(ours, streams, parameters, cotangent).items():
        assert value.dtype == (torch.float32 if name in parameters else torch.bfloat16)
        # Coefficients are exact to 16 bits, products are not rounded, and nothing is rounded more than four times.
        assert error(value, exact[name]) <= min(2 * EPS, 2 * error(plain[name], exact[name]) + EPS), name


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_streams", [2, 3, 4, 6])
def test_equal_streams_stay_bitwise_equal(variant: str, num_streams: int) -> None:
    """With the weights of a conversion, whatever the residual logit: read as they are, written as a residual adds."""
    shape = (1, 4096, 1, 32)
    # Of all sizes, so that the halves of a rounding are met.
    hidden, output = (torch.randn(shape).mul(torch.randn(shape).exp2()).bfloat16() for _ in range(2))
    streams = hidden.repeat(1, 1, num_streams, 1)
    for branch_index, residual_logit in enumerate((0.0, 1.0, 4.0)):
        module = HyperConnection(
            32, num_streams, variant=variant, branch_index=branch_index, residual_logit=residual_logit
        )
        branch_input, write = module(streams)
        assert torch.equal(branch_input, hidden.squeeze(-2))
        assert torch.equal(write(output.squeeze(-2)), (hidden + output).expand_as(streams))


@pytest.mark.parametrize("sums", [("meta",), ()], ids=["sums in fp32", "sums in bf16"])
def test_moves_less_than_half_of_what_wide_copies_do(sums: tuple[str, ...], monkeypatch) -> None:
    monkeypatch.setattr(kernels_eager_passes, "WIDE_SUMS", sums)
    options = traffic.options(["--hidden-size", "2048", "--tokens", "16384"])
    element, ideal = 2 * 2048 * 16384, 10 * 4 + 7
    made: list[torch.Tensor] = []

    class Watching(traffic.Traffic):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = super().__torch_dispatch__(func, types, args, kwargs)
            made.extend(leaf for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor))
            return out

    monkeypatch.setattr(traffic, "Traffic", Watching)
    _, step = traffic.eager(4, options)
    # 8.8 times with wide copies in spans.
    assert sum(step.moved.values()) < 4 * ideal * element
    assert sum(step.launched.values()) < 120
    assert max(tensor.numel() for tensor in made if tensor.dtype == torch.float32) < 4 * 2048 * 16384 / 8
