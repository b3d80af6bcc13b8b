"""Derivatives beyond the first in reverse mode: of any order, in forward mode and in transforms of torch.func.

All of them for few tokens and for many, which the default kernel treats differently.
"""

import pytest
import torch
from support.adapters import adapter_config, base_model, perturb
from support.connected import connected, tiny_llama
from support.runs import retrofitted
from support.tiny import configurations, make_model, separate_streams
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from kromhc_hf import HyperConnection, apply_hyper_connections
from kromhc_hf.modeling import kernels_eager
from kromhc_hf.modeling.variants import VARIANTS


# As many tokens as are few for the default kernel, and more.
LENGTHS = [12, 40]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Relative errors in float64; the norms of a llama compute in float32 whatever the model does.
TOLERANCE, MODEL_TOLERANCE = 1e-10, 1e-4


@pytest.fixture(params=["many", "few", "reference"])
def way(request, monkeypatch) -> str:
    """The three ways through plain PyTorch, whatever the number of tokens; returns the kernel that takes it."""
    if request.param != "few":
        monkeypatch.setattr(kernels_eager, "FEW_TOKENS", 0)
    return "reference" if request.param == "reference" else "torch"


def randomised(variant: str = "kromhc", kernel: str = "torch", num_streams: int = 2, **options) -> HyperConnection:
    module = HyperConnection(3, num_streams, variant=variant, kernel=kernel, **options).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def as_function(module: HyperConnection, times: int = 1):
    """The module with the branch tanh as a function of the streams and its parameters."""
    names = [name for name, _ in module.named_parameters()]

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, streams: Tensor) -> Tensor:
            for _ in range(times):
                branch_input, write = self.module(streams)
                streams = write(torch.tanh(branch_input))
            return streams

    whole = Whole()

    def call(streams: Tensor, *parameters: Tensor) -> Tensor:
        named = {f"module.{name}": parameter for name, parameter in zip(names, parameters, strict=True)}
        return torch.func.functional_call(whole, named, (streams,))

    return call


def close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert expected.abs().max() > 0
    assert ((found - expected).abs().max() / expected.abs().max()).item() < tolerance


# Few tokens take the function that the kernel "reference" is, of whatever variant they are.
CONNECTIONS = [*((way, variant) for way in ("many", "reference") for variant in VARIANTS), ("few", "kromhc")]


@pytest.mark.parametrize(("way", "variant"), CONNECTIONS, indirect=["way"])
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_a_connection_against_finite_differences(way: str, variant: str, dynamic: bool) -> None:
    module = randomised(variant, way, dynamic=dynamic, sinkhorn_iterations=3)
    inputs = (torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True), *module.parameters())
    assert gradcheck(as_function(module), inputs, check_forward_ad=True)
    assert gradgradcheck(as_function(module), inputs, check_fwd_over_rev=True)


def test_a_connection_that_is_used_twice(way: str) -> None:
    """The streams of the second use depend on the parameters, which must not count twice."""
    module = randomised(kernel=way)
    inputs = (torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True), *module.parameters())
    call = as_function(module, times=2)
    once, again = (
        torch.autograd.grad(call(*inputs).sin().sum(), inputs, create_graph=graph) for graph in (False, True)
    )
    for expected, found in zip(once, again, strict=True):
        close(found, expected)
    assert gradgradcheck(call, inputs)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_weights_that_sum_to_one_have_a_derivative_in_forward_mode(way: str, variant: str) -> None:
    """At the lossless init the sum is taken to be exactly 1, and still changes with the biases."""
    module = HyperConnection(3, 4, variant=variant, kernel=way).double()
    bias, streams = module.bias.detach(), torch.randn(1, 2, 4, 3, dtype=torch.float64)
    direction = torch.randn_like(bias)

    def read(bias: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"bias": bias}, (streams,))[0]

    _, expected = torch.autograd.functional.jvp(read, bias, direction)
    close(torch.func.jvp(read, (bias,), (direction,))[1], expected)
    gradient = torch.func.vmap(torch.func.grad(lambda bias: (read(bias) * expected).sum()))(bias[None])[0]
    close(gradient @ direction, expected.square().sum())
    with forward_ad.dual_level(), torch.no_grad():
        close(forward_ad.unpack_dual(read(forward_ad.make_dual(bias, direction))).tangent, expected)


def test_third_derivatives(way: str) -> None:
    module = randomised(kernel=way)
    streams, direction = (torch.randn(1, 3, 2, 3, dtype=torch.float64) for _ in range(2))
    size = torch.zeros((), dtype=torch.float64, requires_grad=True)
    value = as_function(module)(streams + size * direction, *module.parameters()).square().sum()
    for _ in range(3):
        (value,) = torch.autograd.grad(value, size, create_graph=True)

    def along(size: Tensor) -> Tensor:
        return as_function(module)(streams + size * direction, *module.parameters()).square().sum()

    jacfwd = torch.func.jacfwd
    close(value, jacfwd(jacfwd(jacfwd(along)))(size.detach()))


def model_and_embeddings(length: int, model=None, kernel: str = "torch"):
    """The loss as a function of the embeddings, in float64."""
    model = connected(0.1) if model is None else model
    model = model.double().eval()
    # Fused attention has first derivatives only.
    getattr(model, "base_model", model).config._attn_implementation = "eager"
    for module in model.modules():
        if isinstance(module, HyperConnection):
            module.kernel = kernel
    ids = 3 + torch.arange(length)[None] % 90

    def loss(embeddings: Tensor) -> Tensor:
        return model(inputs_embeds=embeddings, labels=ids, use_cache=False).loss

    embeddings = torch.randn(1, length, 32, dtype=torch.float64)
    return model, loss, embeddings


def hessian_product(loss, embeddings: Tensor, direction: Tensor) -> Tensor:
    """By differentiating in reverse mode twice."""
    leaf = embeddings.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    return torch.autograd.grad(grad, leaf, direction)[0]


@pytest.mark.parametrize("length", LENGTHS, ids="{}-tokens".format)
@pytest.mark.parametrize("kernel", ["torch", "reference"])
def test_models_in_every_mode(kernel: str, length: int) -> None:
    _, loss, x = model_and_embeddings(length, kernel=kernel)
    v = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(loss(leaf := x.clone().requires_grad_()), leaf)
    expected = hessian_product(loss, x, v)
    close(torch.func.grad(loss)(x), gradient, MODEL_TOLERANCE)
    close(torch.func.jvp(torch.func.grad(loss), (x,), (v,))[1], expected, MODEL_TOLERANCE)
    close(torch.func.grad(lambda x: torch.func.jvp(loss, (x,), (v,))[1])(x), expected, MODEL_TOLERANCE)
    close(torch.func.jacrev(loss)(x), gradient, MODEL_TOLERANCE)
    close(torch.func.jvp(loss, (x,), (v,))[1], (gradient * v).sum(), MODEL_TOLERANCE)
    per_sample = torch.func.vmap(torch.func.grad(lambda x: loss(x[None])))(torch.cat([x, x + v]))
    close(per_sample[:1], gradient, MODEL_TOLERANCE)


@pytest.mark.parametrize("length", LENGTHS, ids="{}-tokens".format)
@pytest.mark.parametrize("made", ["checkpointing", "gpt2", "adapter", "hc", "attention-readout", "frozen"])
def test_gradient_penalties_of_all_kinds_of_models(made: str, length: int) -> None:
    """Twice in reverse mode, also with respect to the parameters, as the reference has it."""
    if made == "adapter":
        from peft import get_peft_model

        model = get_peft_model(base_model(), adapter_config(num_streams=2))
        perturb(model)
    elif made == "hc":
        model = connected(0.1, variant="hc")
    elif made == "attention-readout":
        model = connected(0.1, readout="attention", stream_embedding=True)
    else:
        model = retrofitted("gpt2") if made == "gpt2" else connected(0.1)
    found = {}
    for kernel in ("torch", "reference"):
        torch.manual_seed(1)
        model, loss, x = model_and_embeddings(length, model, kernel)
        if made == "checkpointing":
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.train()
        if made == "frozen":
            for module in model.modules():
                if isinstance(module, HyperConnection):
                    module.requires_grad_(False)
        leaf = x.requires_grad_()
        (grad,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        wanted = [leaf, *(p for p in model.parameters() if p.requires_grad)]
        grads = torch.autograd.grad(grad.square().sum(), wanted, allow_unused=True, materialize_grads=True)
        found[kernel] = torch.cat([grad.flatten() for grad in grads])
    close(found["torch"], found["reference"], MODEL_TOLERANCE)


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_many_gradients_at_once(kernel: str) -> None:
    """They are those of one after the other, or refused with the way out, which gives them."""
    module = randomised(kernel=kernel)
    streams = torch.randn(1, LENGTHS[-1], 2, 3, dtype=torch.float64, requires_grad=True)
    call, parameters = as_function(module), tuple(module.parameters())
    out, cotangents = call(streams, *parameters), torch.randn(4, *streams.shape, dtype=torch.float64)
    if kernel == "auto":
        with pytest.raises(RuntimeError, match="kernel='reference'.*torch.func.vmap"):
            torch.autograd.grad(out, streams, cotangents, is_grads_batched=True, retain_graph=True)
        (found,) = torch.func.vmap(torch.func.vjp(lambda x: call(x, *parameters), streams)[1])(cotangents)
    else:
        (found,) = torch.autograd.grad(out, streams, cotangents, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad(out, streams, one, retain_graph=True)[0] for one in cotangents]
    close(found, torch.stack(expected))


def test_compiled_transforms_take_operations_that_autograd_knows() -> None:
    # One layer is two connections, and every further one takes a second to compile.
    config = configurations("llama")[0]
    config.num_hidden_layers = 1
    model = apply_hyper_connections(make_model(config))
    separate_streams(model)
    _, loss, x = model_and_embeddings(20, model)
    v = torch.randn_like(x)
    torch.compiler.reset()
    derivative = torch.compile(lambda x: torch.func.jvp(loss, (x,), (v,))[1], backend="aot_eager")
    close(derivative(x), torch.func.jvp(loss, (x,), (v,))[1], MODEL_TOLERANCE)


@pytest.mark.parametrize("length", LENGTHS, ids="{}-tokens".format)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_reference_keeps_the_function_bitwise(variant: str, dtype: torch.dtype, length: int) -> None:
    base = tiny_llama(dtype).eval()
    ids = 3 + torch.arange(2 * length).view(2, -1) % 90
    with torch.no_grad():
        expected, generated = base(ids).logits, base.generate(ids[:, :8], max_new_tokens=4, do_sample=False)
        model = apply_hyper_connections(base, 4, variant=variant)
        for module in model.modules():
            if isinstance(module, HyperConnection):
                module.kernel = "reference"
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model.generate(ids[:, :8], max_new_tokens=4, do_sample=False), generated)


@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_hooks_may_change_outputs_in_place(way: str, recompute: str) -> None:
    """As in the plain model; of streams as well as of what a branch reads."""
    gradients = []
    for in_place in (True, False):
        model = apply_hyper_connections(tiny_llama(), stream_recompute=recompute)
        separate_streams(model)
        for module in model.modules():
            if isinstance(module, HyperConnection):
                module.kernel = way

        def layer_hook(module, inputs, output, in_place=in_place):
            return output.mul_(1.1) if in_place else output * 1.1

        def norm_hook(module, inputs, in_place=in_place):
            return (inputs[0].add_(0.1),) if in_place else (inputs[0] + 0.1,)

        model.model.layers[0].register_forward_hook(layer_hook)
        model.model.layers[1].input_layernorm.register_forward_pre_hook(norm_hook)
        rows = torch.randint(99, (2, 40), generator=torch.Generator().manual_seed(0))
        model(rows, labels=rows).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(grad, gradients[1][name]) for name, grad in gradients[0].items())
