"""Run by test_kernels.py in a process of its own, since Triton decides at import whether to interpret."""

import pytest
import torch

from kromhc_hf import HyperConnection


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run(module: HyperConnection, kernel: str, streams: torch.Tensor, cotangent: torch.Tensor, compiled: bool = False):
    module.kernel = kernel
    streams = streams.detach().clone().requires_grad_()

    def connect(streams):
        branch_input, write = module(streams)
        return branch_input, write(torch.tanh(branch_input))

    torch.compiler.reset()
    call = torch.compile(connect, fullgraph=True, backend="aot_eager") if compiled else connect
    branch_input, out = call(streams)
    grads = torch.autograd.grad(out, [streams, *module.parameters()], cotangent.to(out.dtype))
    return [branch_input, out, *grads]


def randomised(variant: str, num_streams: int, hidden_size: int) -> HyperConnection:
    module = HyperConnection(hidden_size, num_streams, variant=variant)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("variant", "num_streams", "hidden_size"),
    [("kromhc", 2, 24), ("kromhc", 4, 130), ("kromhc", 8, 17), ("kromhc", 3, 16), ("hc", 4, 24), ("mhc", 4, 24)],
)
def test_agrees_with_float64(variant: str, num_streams: int, hidden_size: int, dtype: torch.dtype) -> None:
    module = randomised(variant, num_streams, hidden_size)
    streams = torch.randn(2, 9, num_streams, hidden_size).to(dtype)
    cotangent = torch.randn(2, 9, num_streams, hidden_size).to(dtype)
    found, plain = (run(module, kernel, streams, cotangent) for kernel in ("triton", "torch"))
    exact = run(module.double(), "torch", streams.double(), cotangent.double())
    for actual, other, wanted in zip(found, plain, exact, strict=True):
        assert actual.dtype == other.dtype
        # In fp32 sums of a few hundred terms; in 16 bits twice the error of the plain path.
        allowed = 1e-5 if dtype == torch.float32 else 2 * error(other, wanted) + torch.finfo(dtype).eps
        assert error(actual, wanted) <= allowed


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("num_streams", [2, 3, 4, 8])
def test_identity_init_is_bitwise(num_streams: int, dtype: torch.dtype) -> None:
    hidden, output = torch.randn(2, 9, 24, dtype=dtype), torch.randn(2, 9, 24, dtype=dtype)
    module = HyperConnection(24, num_streams, residual_logit=1.0, branch_index=1, kernel="triton")
    branch_input, write = module(hidden.unsqueeze(-2).expand(-1, -1, num_streams, -1))
    assert torch.equal(branch_input, hidden)
    expected = (hidden.float() + output.float()).to(dtype).unsqueeze(-2)
    assert torch.equal(write(output), expected.expand(-1, -1, num_streams, -1))


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_compiles_whole(dynamic: bool) -> None:
    module = HyperConnection(24, 4, dynamic=dynamic)
    streams, cotangent = torch.randn(2, 5, 4, 24), torch.randn(2, 5, 4, 24)
    compiled, plain = (run(module, "triton", streams, cotangent, compiled=c) for c in (True, False))
    for actual, expected in zip(compiled, plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_operators_are_registered_soundly() -> None:
    from kromhc_hf import triton_kernels as kernels

    streams = torch.randn(5, 4, 24, requires_grad=True)
    h_pre, h_post = torch.rand(5, 4, requires_grad=True), torch.rand(5, 4, requires_grad=True)
    h_res, output = torch.rand(5, 4, 4, requires_grad=True), torch.randn(5, 24, requires_grad=True)
    weight = torch.randn(10, 96, requires_grad=True)
    torch.library.opcheck(kernels.project, (streams, weight))
    torch.library.opcheck(kernels.read, (streams, h_pre))
    torch.library.opcheck(kernels.write, (streams, h_res, h_post, output, True))


def test_refuses_what_it_cannot_serve() -> None:
    module = HyperConnection(8, 4, kernel="triton").double()
    with pytest.raises(ValueError, match=r"kernel 'triton' takes streams in float32, bfloat16 or float16.*Use kernel="):
        module(torch.randn(1, 2, 4, 8, dtype=torch.float64))
