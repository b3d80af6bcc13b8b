"""What only a GPU can show: the Triton kernels as they are compiled, and the plain path, alone and in whole models."""

import copy
import warnings

import pytest
import torch
from support import reference
from support.connected import connected, tiny_llama

from kromhc_hf import HyperConnection, apply_hyper_connections
from kromhc_hf.modeling import kernels


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


KINDS = [("kromhc", 2), ("kromhc", 3), ("kromhc", 4), ("kromhc", 8), ("mhc", 8), ("hc", 8), ("mhc_lite", 6), ("tbp", 8)]


@pytest.mark.parametrize(("variant", "num_streams"), KINDS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_check_passes(dtype: torch.dtype, variant: str, num_streams: int) -> None:
    module = HyperConnection(96, num_streams, variant=variant, device="cuda")
    streams = torch.randn(1, 5, num_streams, 96).cuda()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        chosen = kernels.select_connect(module.kernel, streams.to(dtype), torch.float32, num_streams, 96, variant)
    assert chosen is kernels.connect_triton
    assert "kernel='auto' (triton)" in repr(module)


def results(modules: list[HyperConnection], kernel: str, streams: torch.Tensor, cotangent: torch.Tensor):
    """Of two branches: branch inputs, the new streams, and every gradient."""
    for module in modules:
        module.kernel = kernel
    made, current = [], (leaf := streams.detach().clone().requires_grad_())
    for module in modules:
        branch_input, write = module(current)
        current = write(torch.tanh(branch_input))
        made.append(branch_input)
    parameters = [p for module in modules for p in module.parameters()]
    return [*made, current, *torch.autograd.grad(current, [leaf, *parameters], cotangent)]


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("variant", "num_streams", "hidden_size", "tokens"),
    [
        ("kromhc", 2, 2048, 300),
        ("kromhc", 3, 130, 77),
        ("kromhc", 4, 2048, 4200),
        ("kromhc", 8, 512, 77),
        ("hc", 4, 96, 300),
        ("mhc", 4, 768, 300),
        ("mhc", 8, 64, 77),
        ("identity", 4, 256, 77),
    ],
)
def test_agrees_with_float64(variant: str, num_streams: int, hidden_size: int, tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    modules = [HyperConnection(hidden_size, num_streams, variant=variant, device="cuda") for _ in range(2)]
    for parameter in (p for module in modules for p in module.parameters()):
        torch.nn.init.normal_(parameter, std=0.05)
    streams, cotangent = (torch.randn(1, tokens, num_streams, hidden_size, device="cuda").to(dtype) for _ in range(2))
    found, plain = (results(modules, kernel, streams, cotangent) for kernel in ("triton", "torch"))
    wide = [copy.deepcopy(module).double() for module in modules]
    exact = results(wide, "reference", streams.double(), cotangent.double())
    for place, (value, other, wanted) in enumerate(zip(found, plain, exact, strict=True)):
        # As in the check itself: both round each term of their sums once or twice, and terms may cancel.
        allowed = 4 * error(other, wanted) + max(8 * torch.finfo(dtype).eps, 1e-5)
        assert error(value, wanted) <= allowed, place


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("num_streams", "hidden_size", "tokens"), [(2, 2048, 300), (4, 2048, 4200), (8, 130, 77)])
def test_plain_path_agrees_with_the_equations(
    num_streams: int, hidden_size: int, tokens: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    module = HyperConnection(hidden_size, num_streams, device="cuda")
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    streams, cotangent = (torch.randn(1, tokens, num_streams, hidden_size, device="cuda").to(dtype) for _ in range(2))

    def by_equations(wanted: torch.dtype) -> list[torch.Tensor]:
        leaf = streams.to(wanted).requires_grad_()
        parameters = {name: p.detach().to(wanted).requires_grad_() for name, p in module.named_parameters()}
        branch_input, out = reference.eager_kromhc(parameters, leaf, torch.tanh, module.eps)
        gradients = torch.autograd.grad(out, [leaf, *parameters.values()], cotangent.to(wanted))
        return [branch_input, out, *gradients]

    exact, plain = by_equations(torch.float64), by_equations(dtype)
    for place, value in enumerate(results([module], "torch", streams, cotangent)):
        # As on a CPU: in 16 bits twice the error of plain code in that dtype; in fp32 sums of thousands of terms.
        allowed = 1e-5 if dtype == torch.float32 else 2 * error(plain[place], exact[place]) + torch.finfo(dtype).eps
        assert error(value, exact[place]) <= allowed, place


@pytest.mark.parametrize("tokens", [300, 16384])
def test_plain_path_launches_few_kernels_and_makes_no_wide_copy(tokens: int) -> None:
    module = HyperConnection(2048, 4, device="cuda", kernel="torch")
    streams, cotangent = (torch.randn(1, tokens, 4, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    results([module], "torch", streams, cotangent)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        results([module], "torch", streams, cotangent)
        torch.cuda.synchronize()
    kernels_run = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 0 < len(kernels_run) < 120
    # Streams, new streams, what the branch reads and writes, three gradients of the size of the streams: 7 at most.
    assert torch.cuda.max_memory_allocated() - before < 7.5 * streams.numel() * streams.itemsize + (64 << 20)


@pytest.mark.parametrize("kernel", ["auto", "torch"])
@pytest.mark.parametrize("num_streams", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_fresh_llama_is_the_base_bitwise(dtype: torch.dtype, num_streams: int, kernel: str) -> None:
    base, tokens = tiny_llama(dtype).cuda().eval(), torch.arange(18).view(2, 9).cuda()
    with torch.no_grad():
        expected = base(tokens).logits
        model = set_kernel(apply_hyper_connections(base, num_streams), kernel)
        assert torch.equal(model(tokens).logits, expected)


def set_kernel(model, kernel: str):
    for module in model.modules():
        if isinstance(module, HyperConnection):
            module.kernel = kernel
    return model


@pytest.mark.parametrize("kernel", ["auto", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streams_in_some_layers_are_the_base_bitwise(dtype: torch.dtype, kernel: str) -> None:
    base, tokens = tiny_llama(dtype).cuda().eval(), torch.arange(18).view(2, 9).cuda()
    with torch.no_grad():
        expected = base(tokens).logits
        model = set_kernel(apply_hyper_connections(base, 4, layers=(1, 2)), kernel)
        assert torch.equal(model(tokens).logits, expected)


@pytest.mark.parametrize("kernel", ["auto", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streams_written_again_give_the_same_gradients(dtype: torch.dtype, kernel: str) -> None:
    tokens, gradients = torch.arange(180).remainder(50).view(2, 90).cuda(), []
    for recompute in ("none", "layer", 2):
        torch.manual_seed(0)
        model = set_kernel(connected(0.3, dtype, stream_recompute=recompute), kernel).cuda().train()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for other in gradients[1:]:
        for name, expected in gradients[0].items():
            assert torch.equal(other[name], expected), name


@pytest.mark.parametrize("kernel", ["auto", "torch"])
def test_compiled_llama_agrees(kernel: str) -> None:
    model, tokens = set_kernel(connected(randomness=0.3), kernel).cuda(), torch.arange(18).view(2, 9).cuda()
    gradients = []
    for call in (model, torch.compile(model)):
        model.zero_grad()
        call(tokens, labels=tokens).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-3, atol=1e-5, msg=name)


@torch.no_grad()
def test_recorded_graph_runs_the_same_kernels() -> None:
    module, streams = HyperConnection(96, 4, device="cuda"), torch.randn(1, 5, 4, 96, device="cuda")
    branch_input, write = module(streams)
    expected = write(branch_input)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        branch_input, write = module(streams)
        out = write(branch_input)
    out.zero_()
    graph.replay()
    torch.testing.assert_close(out, expected)
