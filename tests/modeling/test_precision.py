"""Low precision, less memory and compilation: what each of them may change, and what not."""

import copy

import pytest
import torch
from support.runs import CHECKPOINTING, losses, make_trainer, retrofitted
from support.tiny import configurations, make_model, token_ids

from kromhc_hf import KromHCConfig, StreamMetricsCallback, apply_hyper_connections, optimizer_param_groups


DTYPES = [
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.bfloat16, id="bfloat16"),
    pytest.param(torch.float16, id="float16"),
]
FAMILIES = ["llama", "gpt2", "gpt_neox"]


def shallow(model_type: str, layers: int):
    """The configuration of the family with fewer layers, for what takes long to compile."""
    config = configurations(model_type)[0]
    config.num_hidden_layers = layers
    return config


def random_model(model_type: str = "llama", dtype: torch.dtype = torch.float32, layers: int = 3):
    """A tiny model whose hyper-connections are random too, in their biases at least."""
    model = make_model(KromHCConfig(backbone_config=shallow(model_type, layers)), dtype=dtype)
    for parameter in hyper_connection_tensors(model):
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def hyper_connection_tensors(model) -> list[torch.nn.Parameter]:
    return optimizer_param_groups(model, lr=1.0)[-1]["params"]


def gradients(model, ids, **options):
    model.zero_grad()
    loss = model(ids, labels=ids, **options).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_training_step_keeps_hyper_connections_in_float32(model_type, dtype):
    model = random_model(model_type, dtype).train()
    ids = token_ids(model.config)
    for name, gradient in gradients(model, ids).items():
        assert torch.isfinite(gradient).all(), name
    for parameter in hyper_connection_tensors(model):
        assert parameter.dtype is parameter.grad.dtype is torch.float32
        assert parameter.grad.abs().max() > 0
    assert model.lm_head.weight.dtype is dtype if hasattr(model, "lm_head") else True


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_autocast_computes_coefficients_in_float32(model_type, dtype):
    """Under autocast, hyper-connections give bitwise what they give without: mixed precision ends at their border."""
    model = random_model(model_type)
    layers = model.base_model.layers if hasattr(model.base_model, "layers") else model.base_model.h
    for name in layers[1].spec.names:
        module = getattr(layers[1], name)
        streams, output = torch.randn(2, 5, 4, 32), torch.randn(2, 5, 32)
        branch_input, write = module(streams)
        with torch.autocast("cpu", dtype=dtype):
            low_input, low_write = module(streams)
            assert torch.equal(low_input, branch_input)
            assert torch.equal(low_write(output), write(output))
    ids = token_ids(model.config)
    exact = model(ids, labels=ids).loss
    with torch.autocast("cpu", dtype=dtype):
        low = model(ids, labels=ids).loss
    low.backward()
    assert all(parameter.grad.dtype is torch.float32 for parameter in model.parameters())
    # Three layers with a handful of matrix products each, rounded to 8 (bf16) or 11 (fp16) bits.
    assert abs(low - exact) / exact < 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_checkpointing_gives_the_same_gradients(model_type, reentrant, dtype):
    model = random_model(model_type, dtype).train()
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = token_ids(model.config)
    plain = gradients(model, ids)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    calls = count_layer_calls(model)
    for name, gradient in gradients(model, ids).items():
        assert torch.equal(gradient, plain[name]), name
    # Each of the three layers ran a second time in the backward pass.
    assert calls == [6]


def count_layer_calls(model) -> list[int]:
    calls = [0]

    def count(*_):
        calls[0] += 1

    first = next(module for module in model.modules() if hasattr(module, "hc_layer_index"))
    for module in model.modules():
        if type(module) is type(first):
            getattr(module, module.spec.names[0]).register_forward_pre_hook(count)
    return calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["alone", "checkpointing"])
def test_activation_offload_gives_the_same_gradients(checkpointing, dtype):
    model = random_model("llama", dtype).train()
    ids = token_ids(model.config)
    plain = gradients(model, ids)
    if checkpointing:
        model.activation_checkpointing_enable()
    saved = []

    def pack(tensor):
        saved.append(tuple(tensor.shape))
        return tensor.to("cpu", copy=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        offloaded = gradients(model, ids)
    # The streams of the three layers are among what is offloaded; of their input, with checkpointing.
    assert saved.count((2, 12, 4, 32)) + saved.count((2, 12, 4 * 32)) >= (2 if checkpointing else 6)
    for name, gradient in plain.items():
        assert torch.equal(offloaded[name], gradient), name


def assert_equal_up_to_order(actual: dict, expected: dict) -> None:
    """The same operations, decomposed and summed in another order: a few hundred roundings of fp32."""
    for name, gradient in actual.items():
        wanted = expected[name.removeprefix("_orig_mod.")]
        assert (gradient - wanted).abs().max() <= 500 * torch.finfo(torch.float32).eps * wanted.abs().max(), name


@pytest.mark.parametrize("model_type", FAMILIES)
def test_no_graph_break_that_the_native_model_does_not_have(model_type):
    model = make_model(shallow(model_type, 1)).train()
    ids = token_ids(model.config)

    def breaks() -> int:
        torch.compiler.reset()
        return torch._dynamo.explain(model)(ids, labels=ids).graph_break_count

    native = breaks()
    # GPT-2's native class warns about its loss type inside the graph.
    assert native == (1 if model_type == "gpt2" else 0)
    apply_hyper_connections(model)
    assert breaks() == native


@pytest.mark.parametrize("model_type", FAMILIES)
def test_compiled_training_step(model_type):
    torch.compiler.reset()
    model = random_model(model_type, layers=2).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = token_ids(model.config)

    def step(module):
        model.zero_grad()
        logits = module(ids, use_cache=False).logits
        logits.logsumexp(-1).mean().backward()
        return {"logits": logits.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = step(model)
    # fullgraph raises at the first graph break.
    assert_equal_up_to_order(step(torch.compile(model, fullgraph=True, backend="aot_eager")), plain)


def test_inductor_compiles_the_training_step():
    torch.compiler.reset()
    model = random_model("llama", layers=1).train()
    ids = token_ids(model.config)
    plain = gradients(model, ids)
    assert_equal_up_to_order(gradients(torch.compile(model, fullgraph=True), ids), plain)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_generation_with_a_compiled_static_cache(model_type):
    torch.compiler.reset()
    model = random_model(model_type, layers=2)
    ids = token_ids(model.config, length=6)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    dynamic = model.generate(ids, **options)
    static = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, dynamic)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), dynamic)


def test_metrics_of_a_compiled_trainer(tmp_path):
    torch.compiler.reset()
    options = {"max_steps": 3, "torch_compile": True, "torch_compile_backend": "aot_eager"}

    def one_layer():
        return apply_hyper_connections(make_model(shallow("llama", 1)))

    compiled = make_trainer(tmp_path / "a", one_layer(), [StreamMetricsCallback(every=2)], **options)
    compiled.train()
    sampled = [entry["step"] for entry in compiled.state.log_history if "hc/off_identity_mass" in entry]
    assert sampled == [1, 3]
    plain = make_trainer(tmp_path / "b", one_layer(), max_steps=3)
    plain.train()
    # AdamW's first steps divide by gradients near zero, which magnifies roundings; at a learning rate of .01 a sign
    # that flips in one step of a single weight moves the loss by less than 1e-3.
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-3)


@pytest.mark.parametrize("options", [{"bf16": True}, {CHECKPOINTING: True, "bf16": True}], ids=["bf16", "both"])
def test_trainer_in_mixed_precision_keeps_parameters_in_float32(tmp_path, options):
    trainer = make_trainer(tmp_path, retrofitted(), **options)
    trainer.train()
    assert len(losses(trainer)) == 6
    assert all(parameter.dtype is torch.float32 for parameter in trainer.model.parameters())


def test_bfloat16_trainer_updates_float32_hyper_connections(tmp_path):
    model = retrofitted("llama").to(torch.bfloat16)
    before = copy.deepcopy(hyper_connection_tensors(model))
    trainer = make_trainer(tmp_path, model, learning_rate=1e-4)
    trainer.train()
    for old, new in zip(before, hyper_connection_tensors(trainer.model), strict=True):
        assert new.dtype is torch.float32
        assert not torch.equal(old, new)
    assert trainer.model.lm_head.weight.dtype is torch.bfloat16
