"""Every way to read and write the streams, against the definition and against each other."""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from support import reference
from support.connected import tiny_llama

from kromhc_hf import HyperConnection, apply_hyper_connections
from kromhc_hf.modeling import kernels_compiled, kernels_eager, kernels_eager_passes
from kromhc_hf.modeling.kernels_eager_passes import SPAN_ELEMENTS, Streams
from kromhc_hf.modeling.kernels_triton_language import AVAILABLE
from kromhc_hf.modeling.mixing import Mixing
from kromhc_hf.modeling.variants import VARIANTS


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(autouse=True)
def many(monkeypatch) -> int:
    """Sends the small tensors of these tests the way of many tokens; returns how many tokens would be few."""
    few = kernels_eager.FEW_TOKENS
    monkeypatch.setattr(kernels_eager, "FEW_TOKENS", 0)
    return few


def randomised(variant: str, num_streams: int, hidden_size: int, **options) -> HyperConnection:
    module = HyperConnection(hidden_size, num_streams, variant=variant, **options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def step(module: HyperConnection, streams: torch.Tensor, cotangent: torch.Tensor) -> dict[str, torch.Tensor]:
    """The branch input, the new streams and every gradient."""
    streams = streams.detach().clone().requires_grad_()
    branch_input, write = module(streams)
    out = write(torch.tanh(branch_input))
    grads = torch.autograd.grad(out, [streams, *module.parameters()], cotangent)
    names = ["streams", *(name for name, _ in module.named_parameters())]
    return {"branch_input": branch_input, "out": out} | dict(zip(names, grads, strict=True))


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found - exact).abs().max() / exact.abs().max()).item()


def eager(module: HyperConnection, streams: torch.Tensor, cotangent: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same from the equations, in the dtype of the streams."""
    streams = streams.detach().clone().requires_grad_()
    parameters = {name: p.detach().to(streams.dtype).requires_grad_() for name, p in module.named_parameters()}
    branch_input, out = reference.eager_kromhc(parameters, streams, torch.tanh, module.eps)
    grads = torch.autograd.grad(out, [streams, *parameters.values()], cotangent)
    return {"branch_input": branch_input, "out": out} | dict(zip(["streams", *parameters], grads, strict=True))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("num_streams", [2, 4, 8], ids="n{}".format)
def test_agrees_with_the_equations(num_streams: int, dtype: torch.dtype) -> None:
    module = randomised("kromhc", num_streams, 96)
    streams, cotangent = (torch.randn(2, 33, num_streams, 96).to(dtype) for _ in range(2))
    exact = eager(module, streams.double(), cotangent.double())
    found = step(module, streams, cotangent)
    plain = eager(module, streams, cotangent)
    for name, value in found.items():
        # In 16 bits twice the error of plain code in that dtype; what is computed in fp32 may be exact there.
        allowed = 1e-5 if dtype == torch.float32 else 2 * error(plain[name], exact[name]) + torch.finfo(dtype).eps
        assert error(value, exact[name]) <= allowed, name


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_gradcheck(variant: str, dynamic: bool) -> None:
    module = randomised(variant, 3, 4, dynamic=dynamic).double()
    names = [name for name, _ in module.named_parameters()]

    def connect(streams: torch.Tensor, *parameters: torch.Tensor):
        def both(streams):
            branch_input, write = module.forward(streams)
            return branch_input, write(torch.tanh(branch_input))

        wrapped = torch.nn.Module()
        wrapped.module, wrapped.forward = module, both
        return torch.func.functional_call(
            wrapped, {f"module.{name}": p for name, p in zip(names, parameters)}, (streams,)
        )

    streams = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(connect, (streams, *module.parameters()))


@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float64], ids=[*DTYPES, "float64"])
def test_spans_do_not_matter(dtype: torch.dtype, monkeypatch) -> None:
    module = randomised("kromhc", 4, 24)
    streams, cotangent = (torch.randn(3, 7, 4, 24).to(dtype) for _ in range(2))
    whole = step(module, streams, cotangent)
    assert streams.numel() < SPAN_ELEMENTS
    monkeypatch.setattr(kernels_eager_passes, "SPAN_ELEMENTS", 5 * 4 * 24)
    found = step(module, streams, cotangent)
    with torch.no_grad():
        found["read"], write = module(streams)
        found["written"] = write(torch.tanh(found["read"]))
    whole |= {"read": whole["branch_input"], "written": whole["out"]}
    for name, value in found.items():
        # Products are summed in another order; where that tips a rounding, one ulp.
        assert error(value, whole[name]) <= max(1e-5, torch.finfo(value.dtype).eps), name


@pytest.mark.parametrize("form", ["plain", "differences"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("variant", ["kromhc", "hc"])
def test_forms_of_the_sums_agree(variant: str, dtype: torch.dtype, form: str, monkeypatch) -> None:
    module, streams, cotangent = randomised(variant, 4, 24), *(torch.randn(2, 7, 4, 24).to(dtype) for _ in range(2))
    exact = step(module.double(), streams.double(), cotangent.double())
    monkeypatch.setattr(Streams, "of", lambda tokens: Streams(tokens, form))
    for name, value in step(module.float(), streams, cotangent).items():
        # One rounding to the streams' dtype on the way in and one on the way out, of terms twice the size of the sum.
        assert error(value, exact[name]) <= max(1e-5, 4 * torch.finfo(dtype).eps), name


@pytest.mark.parametrize("form", ["equal", "differences"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_equal_streams_pass_bitwise_in_every_form_but_the_plain_one(dtype: torch.dtype, form: str, monkeypatch) -> None:
    hidden, output = torch.randn(2, 2, 50, 24).to(dtype)
    module = HyperConnection(24, 4, residual_logit=1.0)
    monkeypatch.setattr(Streams, "of", lambda tokens: Streams(tokens, form))
    branch_input, write = module(hidden.unsqueeze(-2).expand(-1, -1, 4, -1))
    assert torch.equal(branch_input, hidden)
    assert torch.equal(write(output), (hidden + output).unsqueeze(-2).expand(-1, -1, 4, -1))


def test_form_is_seen_in_the_streams() -> None:
    hidden = torch.randn(9, 1, 24)
    different = hidden.repeat(1, 4, 1)
    assert Streams.of(hidden.expand(-1, 4, -1)).form == "equal"
    assert Streams.of(different).form == "equal"
    different[8, 3, 23] += 1
    assert Streams.of(different).form == "plain"
    # Nothing to look at.
    assert Streams.of(different.to("meta")).form == "differences"


def test_few_tokens_agree_with_many(many: int, monkeypatch) -> None:
    module, streams, output = randomised("kromhc", 4, 24), torch.randn(1, 40, 4, 24), torch.randn(1, 40, 24)
    with torch.no_grad():
        branch_input, write = module(streams)
        out = write(output)
        monkeypatch.setattr(kernels_eager, "FEW_TOKENS", many)
        for token in range(0, 40, 8):
            part = slice(token, token + 8)
            few_input, write = module(streams[:, part])
            torch.testing.assert_close(few_input, branch_input[:, part], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(write(output[:, part]), out[:, part], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_layouts_of_the_streams(layout: str) -> None:
    module, hidden = randomised("kromhc", 4, 24), torch.randn(2, 5, 24)
    if layout == "expanded":
        streams = hidden.unsqueeze(-2).expand(-1, -1, 4, -1)
    else:
        streams = torch.randn(5, 2, 24, 4).permute(1, 0, 3, 2)
    cotangent = torch.randn(2, 5, 4, 24)
    expected = step(module, streams.contiguous(), cotangent)
    streams = streams.detach().requires_grad_()
    branch_input, write = module(streams)
    out = write(torch.tanh(branch_input))
    torch.testing.assert_close(out, expected["out"])
    torch.testing.assert_close(torch.autograd.grad(out, streams, cotangent)[0], expected["streams"])


@pytest.mark.parametrize("dim", [-3, -2, -1])
@pytest.mark.parametrize("kernel", ["torch", "reference"])
def test_expanded_gradients(kernel: str, dim: int) -> None:
    """As behind a sum over tokens, streams or features: the same as from the gradient written out."""
    module, streams = randomised("kromhc", 4, 24, kernel=kernel), torch.randn(2, 9, 4, 24)
    expanded = torch.randn(2, 9, 4, 24).narrow(dim, 0, 1).expand(2, 9, 4, 24)
    dense, found = (step(module, streams, cotangent) for cotangent in (expanded.contiguous(), expanded))
    for name, value in found.items():
        # One gradient for all streams meets sums of weights instead of being summed with each.
        allowed = 1e-5 if kernel == "torch" and dim == -2 else 0.0
        assert error(value, dense[name]) <= allowed, name


def test_saves_the_streams_the_branch_output_and_little_else() -> None:
    module, streams = HyperConnection(256, 4), torch.randn(1, 32, 4, 256, requires_grad=True)
    output = torch.randn(1, 32, 256, requires_grad=True)
    known = {t.untyped_storage().data_ptr() for t in (streams, output, *module.parameters())}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _, write = module(streams)
        write(output)
    others = sum(storage.nbytes() for address, storage in saved.items() if address not in known)
    # 10 products, a mean square and 4 write weights.
    assert others == 32 * 15 * 4
    assert others < 0.05 * streams.untyped_storage().nbytes()


def test_parts_of_the_gradient() -> None:
    """A branch that is not written back, frozen streams, a frozen connection, and one output used alone."""
    module, streams = randomised("kromhc", 4, 8), torch.randn(1, 3, 4, 8)
    branch_input, _ = module(streams.requires_grad_())
    (grad,) = torch.autograd.grad(branch_input.sum(), streams)
    assert grad.abs().sum() > 0
    _, write = module(streams.detach())
    output = torch.randn(1, 3, 8, requires_grad=True)
    grads = torch.autograd.grad(write(output).sum(), [output, *module.parameters()])
    assert all(grad.abs().sum() > 0 for grad in grads)
    module.requires_grad_(False)
    _, write = module(streams.detach())
    (alone,) = torch.autograd.grad(write(output).sum(), output)
    assert torch.equal(alone, grads[0])


@pytest.mark.parametrize("variant", ["kromhc", "hc", "tbp"])
def test_compiled_agrees(variant: str) -> None:
    torch.compiler.reset()
    module = randomised(variant, 4, 16)
    streams, cotangent = torch.randn(2, 5, 4, 16), torch.randn(2, 5, 4, 16)
    leaf = streams.clone().requires_grad_()

    def connect(streams: torch.Tensor):
        branch_input, write = module(streams)
        return write(torch.tanh(branch_input))

    # Compiled before it is called: what a first call would leave on the module must not be needed.
    out = torch.compile(connect, fullgraph=True, backend="aot_eager")(leaf)
    expected = step(module, streams, cotangent)
    torch.testing.assert_close(out, expected["out"], rtol=1e-5, atol=1e-5)
    for name, grad in zip(["streams", *dict(module.named_parameters())], torch.autograd.grad(
        out, [leaf, *module.parameters()], cotangent
    )):  # fmt: skip
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5)


def test_compiled_passes_make_no_second_name_of_a_tensor() -> None:
    """As a cast to the same dtype is: torch 2.11 would compile gradients of zeros."""
    streams, weight = torch.randn(3, 4, 8), torch.randn(10, 32)
    h_pre, h_res, output = torch.rand(3, 4), torch.rand(3, 4, 4), torch.randn(3, 8)
    with mock.patch.object(torch.Tensor, "to", side_effect=AssertionError("a cast that changes nothing")):
        kernels_compiled.Project.forward(mock.Mock(), streams, weight)
        kernels_compiled.Read.forward(mock.Mock(), streams, h_pre)
        kernels_compiled.Write.forward(mock.Mock(), streams, h_res, h_pre, output, True)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_fused_kernels_know_the_gates(variant: type[Mixing]) -> None:
    assert variant.plain_gates == (variant.gates is Mixing.gates and variant.predict is Mixing.predict)


def test_updated_parameters_are_seen() -> None:
    module, streams = randomised("kromhc", 4, 8), torch.randn(1, 1, 4, 8)
    with torch.no_grad():
        before = module(streams)[0]
        module.bias.data += 1
        assert not torch.equal(module(streams)[0], before)


def test_kernel_is_visible_and_never_silent() -> None:
    assert "kernel='torch'" in repr(HyperConnection(8, 4, kernel="torch"))
    assert "kernel='auto' (torch)" in repr(HyperConnection(8, 4))
    with pytest.raises(ValueError, match=r"kernel must be one of auto, torch, triton, reference; got 'cuda'"):
        HyperConnection(8, 4, kernel="cuda")
    module = HyperConnection(8, 4)
    module.kernel = "eager"
    with pytest.raises(ValueError, match=r"kernel must be one of auto, torch, triton, reference; got 'eager'"):
        module(torch.randn(1, 2, 4, 8))
    module = HyperConnection(8, 4, kernel="triton")
    message = "needs a CUDA device" if AVAILABLE else "needs the package triton"
    with pytest.raises(ValueError, match=rf"kernel 'triton' {message}.*Use kernel='auto' or kernel='torch'"):
        module(torch.randn(1, 2, 4, 8))


def test_triton_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    support = Path(__file__).parents[1] / "support"
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [str(support / f"{name}.py") for name in ("triton_interpreter", "triton_check")]
    result = subprocess.run(command, env=environment, cwd=support.parents[1], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]


def test_models_choose_by_themselves() -> None:
    model = apply_hyper_connections(tiny_llama(), 2)
    kernels = {module.kernel for module in model.modules() if isinstance(module, HyperConnection)}
    assert kernels == {"auto"}
