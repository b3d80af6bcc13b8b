"""Run by test_kernels.py in a process of its own, since Triton decides at import whether to interpret."""

import copy

import pytest
import torch
from support.connected import connected, tiny_llama

from kromhc_hf import HyperConnection, apply_hyper_connections
from kromhc_hf.modeling.kernels_connect import fuses


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Tokens: the interpreter runs one program after the other, and there is one for each token in some kernels. So many do
# not fit into one program where a program takes four.
FEW = 6


def in_dtypes(*sizes: tuple[str, int, int]) -> list:
    """Each of the sizes in float32 and in bfloat16, and the first of them in float16.

    What float16 has of its own is a conversion: it takes the lines of float32, in launches of the size of bfloat16's.
    """
    cases = [(case, name) for case in sizes for name in ("float32", "bfloat16")] + [(sizes[0], "float16")]
    return [pytest.param(*case, DTYPES[name], id="-".join(map(str, (*case, name)))) for case, name in cases]


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


@pytest.mark.parametrize(
    ("variant", "num_streams", "hidden_size", "dtype"),
    in_dtypes(("kromhc", 4, 130), ("kromhc", 3, 16), ("hc", 4, 24)),
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


@pytest.mark.parametrize(
    ("variant", "num_streams", "fused"),
    [("kromhc", 8, True), ("mhc", 8, False), ("mhc_lite", 4, True), ("tbp", 3, True), ("mhc_lite", 5, False)],
)
def test_many_outputs(variant: str, num_streams: int, fused: bool) -> None:
    module, streams = randomised(variant, num_streams, 12), torch.randn(1, 5, num_streams, 12)
    assert fuses(module.weight, module.mixing) == fused
    cotangent = torch.randn_like(streams)
    found = run(module, "triton", streams, cotangent)
    exact = run(module.double(), "torch", streams.double(), cotangent.double())
    for actual, wanted in zip(found, exact, strict=True):
        assert error(actual, wanted) <= 1e-5


def run_two(modules: list[HyperConnection], streams: torch.Tensor, cotangent: torch.Tensor, compiled: bool = False):
    """Two branches, and every gradient."""
    first, second = modules
    streams = streams.detach().clone().requires_grad_()

    def connect(streams):
        branch_input, write = first(streams)
        output = torch.tanh(branch_input)
        following, write_again = second(write(output))
        return branch_input, following, write_again(torch.tanh(following))

    torch.compiler.reset()
    call = torch.compile(connect, fullgraph=True, backend="aot_eager") if compiled else connect
    *inputs, out = call(streams)
    grads = torch.autograd.grad(out, [streams, *first.parameters(), *second.parameters()], cotangent)
    return [*inputs, out, *grads]


def two(kernel: str, num_streams: int, hidden_size: int, variant: str = "kromhc") -> list[HyperConnection]:
    torch.manual_seed(1)
    modules = [randomised(variant, num_streams, hidden_size) for _ in range(2)]
    for module in modules:
        module.kernel = kernel
    return modules


@pytest.mark.parametrize(
    ("variant", "num_streams", "hidden_size", "dtype"),
    in_dtypes(
        *(("kromhc", 4, 70), ("kromhc", 2, 24), ("kromhc", 3, 40), ("kromhc", 8, 17)),
        *(("mhc", 4, 24), ("identity", 2, 24)),
    ),
)
def test_two_branches_agree_with_float64(variant: str, num_streams: int, hidden_size: int, dtype: torch.dtype) -> None:
    # Of one of the sizes so many that every kernel has more than one program for them.
    tokens = 18 if (variant, num_streams) == ("kromhc", 4) else FEW
    streams, cotangent = (torch.randn(2, tokens // 2, num_streams, hidden_size).to(dtype) for _ in range(2))
    found, plain = (run_two(two(k, num_streams, hidden_size, variant), streams, cotangent) for k in ("triton", "torch"))
    wide = [module.double() for module in two("torch", num_streams, hidden_size, variant)]
    exact = run_two(wide, streams.double(), cotangent.double())
    for actual, other, wanted in zip(found, plain, exact, strict=True):
        assert actual.dtype == other.dtype
        allowed = 1e-5 if dtype == torch.float32 else 2 * error(other, wanted) + torch.finfo(dtype).eps
        assert error(actual, wanted) <= allowed


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("num_streams", [2, 3, 4, 8])
def test_identity_init_is_bitwise(num_streams: int, dtype: torch.dtype) -> None:
    hidden, output = (torch.randn(2, FEW // 2, 24, dtype=dtype) for _ in range(2))
    first, second = (
        HyperConnection(24, num_streams, residual_logit=1.0, branch_index=branch, kernel="triton") for branch in (0, 1)
    )
    branch_input, write = first(hidden.unsqueeze(-2).expand(-1, -1, num_streams, -1))
    assert torch.equal(branch_input, hidden)
    expected = (hidden.float() + output.float()).to(dtype)
    assert torch.equal(write(output), expected.unsqueeze(-2).expand(-1, -1, num_streams, -1))
    branch_input, write = second(write(output))
    assert torch.equal(branch_input, expected)
    expected = (expected.float() + output.float()).to(dtype).unsqueeze(-2)
    assert torch.equal(write(output), expected.expand(-1, -1, num_streams, -1))


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_compiles_whole(dynamic: bool) -> None:
    module = HyperConnection(24, 4, dynamic=dynamic)
    streams, cotangent = torch.randn(2, 5, 4, 24), torch.randn(2, 5, 4, 24)
    compiled, plain = (run(module, "triton", streams, cotangent, compiled=c) for c in (True, False))
    for actual, expected in zip(compiled, plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_two_branches_compile_whole() -> None:
    streams, cotangent = torch.randn(2, 5, 4, 24), torch.randn(2, 5, 4, 24)
    compiled, plain = (run_two(two("triton", 4, 24), streams, cotangent, compiled=c) for c in (True, False))
    for actual, expected in zip(compiled, plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_operators_are_registered_soundly() -> None:
    streams = torch.randn(5, 4, 24, requires_grad=True)
    h_pre, h_post = torch.rand(5, 4, requires_grad=True), torch.rand(5, 4, requires_grad=True)
    h_res, output = torch.rand(5, 4, 4, requires_grad=True), torch.randn(5, 24, requires_grad=True)
    weight, bias = torch.randn(10, 96, requires_grad=True), torch.randn(10, requires_grad=True)
    parameters = (weight, bias, torch.randn(3, requires_grad=True))
    arguments = {
        "project": (streams, weight),
        "read": (streams, h_pre),
        "write": (streams, h_res, h_post, output, True),
        "gates": tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in (streams, *parameters, 1e-6)),
        "gate_gradients": (
            *(output.detach(), streams.detach(), h_pre.detach(), h_post.detach(), torch.rand(5, 4)),
            *(torch.randn(5, 2), torch.randn(5, 10), torch.rand(5), torch.randn(3), 1e-6),
        ),
        "streams_gradient": tuple(
            t.detach() for t in (streams, output, streams, h_pre, weight, torch.randn(5, 10), torch.randn(5))
        ),
        "weight_gradient": (streams.detach().flatten(1), torch.randn(5, 10)),
        "read_backward": (output.detach(), streams.detach(), h_pre.detach()),
        "write_backward": tuple(t.detach() for t in (streams, streams, h_res, h_post, output)),
    }
    for name, values in arguments.items():
        torch.library.opcheck(getattr(torch.ops.kromhc_hf, name).default, values)


def with_kernel(model: torch.nn.Module, kernel: str) -> torch.nn.Module:
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, HyperConnection):
            module.kernel = kernel
    return model


def loss_and_gradients(model: torch.nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("checkpointed", [False, True], ids=["whole", "checkpointed"])
def test_llama_agrees(checkpointed: bool) -> None:
    model, tokens = connected(randomness=0.3), torch.arange(FEW).view(2, -1)
    expected = loss_and_gradients(with_kernel(model, "torch"), tokens)
    triton = with_kernel(model, "triton").train()
    if checkpointed:
        triton.gradient_checkpointing_enable()
    found = loss_and_gradients(triton, tokens)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_fresh_llama_is_the_base_bitwise(dtype: torch.dtype) -> None:
    base, tokens = tiny_llama(dtype).eval(), torch.arange(FEW).view(2, -1)
    with torch.no_grad():
        expected = base(tokens).logits
        model = with_kernel(apply_hyper_connections(base, 4), "triton")
        assert torch.equal(model(tokens).logits, expected)


def test_refuses_what_it_cannot_serve() -> None:
    module = HyperConnection(8, 4, kernel="triton").double()
    with pytest.raises(ValueError, match=r"kernel 'triton' takes streams in float32, bfloat16 or float16.*Use kernel="):
        module(torch.randn(1, 2, 4, 8, dtype=torch.float64))
    module = HyperConnection(8, 16, kernel="triton")
    with pytest.raises(ValueError, match=r"kernel 'triton' takes at most 8 streams; got 16. Use kernel='auto'"):
        module(torch.randn(1, 2, 16, 8))


CONNECTIONS = {
    "fused": {"variant": "kromhc"},
    "static": {"variant": "kromhc", "dynamic": False},
    "passes": {"variant": "mhc_lite", "num_streams": 5},
}


@pytest.mark.parametrize("options", CONNECTIONS.values(), ids=CONNECTIONS)
def test_second_derivatives(options: dict) -> None:
    module = HyperConnection(6, **{"num_streams": 4} | options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    streams = torch.randn(1, 3, module.num_streams, 6)
    found = {}
    for kernel in ("triton", "reference"):
        module.kernel = kernel
        leaves = [streams.clone().requires_grad_(), *module.parameters()]
        branch_input, write = module(leaves[0])
        first = torch.autograd.grad(write(torch.tanh(branch_input)).square().sum(), leaves, create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        found[kernel] = [*first, *torch.autograd.grad(penalty, leaves)]
    for value, expected in zip(found["triton"], found["reference"], strict=True):
        assert error(value, expected) <= 1e-5


def test_refuses_derivatives_that_it_does_not_have() -> None:
    module, streams = HyperConnection(8, 4, kernel="triton"), torch.randn(1, 3, 4, 8)

    def squares(streams: torch.Tensor) -> torch.Tensor:
        branch_input, write = module(streams)
        return write(torch.tanh(branch_input)).square().sum()

    for transform in (torch.func.grad(squares), lambda x: torch.func.jvp(squares, (x,), (x,))):
        with pytest.raises(ValueError, match=r"kernel 'triton' has no forward-mode derivatives.*Use kernel='auto'"):
            transform(streams)


@pytest.mark.parametrize(("variant", "dynamic"), [("kromhc", True), ("kromhc", False), ("hc", True)])
def test_streams_that_are_not_kept(variant: str, dynamic: bool) -> None:
    assert fuses(*[getattr(HyperConnection(16, 4), name) for name in ("weight", "mixing")])
    connections = [HyperConnection(16, 4, variant=variant, dynamic=dynamic, branch_index=i) for i in range(3)]
    parameters = [parameter for module in connections for parameter in module.parameters()]
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.3)
    first, cotangent = torch.randn(1, 3, 4, 16), torch.randn(1, 3, 4, 16)
    results = []
    for branches in (0, 2, 3):
        leaf, saved = first.clone().requires_grad_(), {}
        streams = leaf.clone()

        def pack(tensor, saved=saved):
            if tensor.numel() == first.numel():
                saved[tensor.data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            for module in connections:
                module.kernel = "triton"
                branch_input, write = module(streams, branches)
                streams = write(torch.tanh(branch_input))
        results.append([streams, *torch.autograd.grad(streams, [leaf, *parameters], cotangent)])
        assert len(saved) == {0: 3, 2: 2, 3: 1}[branches]
    for found in results[1:]:
        assert all(map(torch.equal, found, results[0]))
