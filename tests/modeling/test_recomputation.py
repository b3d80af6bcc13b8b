"""Streams that are written again in the backward pass: the same bits everywhere, and memory that is not kept.

It is longer than other files because every way to run a model is tried on the same models.
"""

import copy
import gc
import weakref
from contextlib import nullcontext
from math import prod

import pytest
import torch
from support.runs import losses, make_trainer
from support.tiny import configurations, make_model
from transformers import AutoModelForCausalLM

from kromhc_hf import HyperConnection, KromHCConfig, KromHCPeftConfig, apply_hyper_connections, record_mappings
from kromhc_hf.modeling.stream_blocks import layers_of_block, read_recompute


DTYPES = [torch.float32, torch.bfloat16]
FAMILIES = ["llama", "gpt2", "gpt_neox", "gemma2", "cohere", "mixtral", "gemma4_text", "granite", "bamba"]
BLOCKS = ["layer", "auto", 2, 100]


def random_model(model_type: str = "llama", dtype: torch.dtype = torch.float32, layers: int | None = None, **options):
    """A tiny model in training mode whose streams and mappings are far from those of a conversion."""
    torch.manual_seed(0)
    config = configurations(model_type)[0]
    for name in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.1)
    if layers is not None:
        config.num_hidden_layers = layers
    fields = {f"hc_{name}": value for name, value in options.items()}
    model = make_model(KromHCConfig(backbone_config=config, **fields), dtype=dtype)
    for module in model.modules():
        if isinstance(module, HyperConnection):
            for parameter in module.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.train()


def token_ids(model, rows: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(3, model.config.get_text_config().vocab_size, (rows, length))


def loss_of(model, ids, **arguments):
    torch.manual_seed(1)  # of dropout
    return model(ids, labels=ids, use_cache=False, **arguments).loss


def gradients(model, ids, context=nullcontext, **arguments) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with context():
        loss = loss_of(model, ids, **arguments)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def saved_streams(model, ids, num_streams: int = 4) -> int:
    """How many tensors of the size of all streams the graph keeps, each piece of memory once."""
    size, found = ids.numel() * num_streams * model.config.hidden_size, {}

    def pack(tensor):
        if tensor.numel() == size and tensor.stride(-2) > 0 and tensor.dim() > 2:
            found[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model, ids)
    return len(found)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_gradients_are_bitwise_the_same(model_type, dtype) -> None:
    model = random_model(model_type, dtype)
    ids = token_ids(model)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    expected = gradients(model, ids, attention_mask=mask)
    assert any("_hc." in name and value.abs().max() > 0 for name, value in expected.items())
    for blocks in BLOCKS:
        model.config.hc_stream_recompute = blocks
        assert_same(gradients(model, ids, attention_mask=mask), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "mhc"},
        {"variant": "hc"},
        {"variant": "tbp", "dynamic": False},
        {"variant": "one_sided", "num_streams": 3, "stream_embedding": True},
        {"variant": "mhc_lite", "readout": "sigmoid"},
        {"num_streams": 8, "readout": "norm_sum", "init": "paper"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_variant(options) -> None:
    model = random_model(**options)
    ids = token_ids(model)
    expected = gradients(model, ids)
    model.config.hc_stream_recompute = 2
    assert_same(gradients(model, ids), expected)


# With 6 layers of two branches, whose first streams are copies of one.
@pytest.mark.parametrize(
    ("blocks", "kept"), [("none", 11), ("layer", 5), (2, 2), (3, 1), (6, 0), (100, 0), ("auto", 2)]
)
def test_the_streams_inside_of_a_block_are_not_kept(blocks, kept) -> None:
    model = random_model(layers=6, stream_recompute=blocks)
    assert saved_streams(model, token_ids(model)) == kept


def test_parallel_blocks_have_one_branch_per_layer() -> None:
    model = random_model("gpt_neox", layers=4)
    for blocks, kept in (("none", 3), ("layer", 3), (2, 1), (4, 0)):
        model.config.hc_stream_recompute = blocks
        assert saved_streams(model, token_ids(model)) == kept


def test_length_of_a_block() -> None:
    assert [layers_of_block("auto", 4, layers) for layers in (1, 8, 16, 32)] == [1, 2, 3, 5]
    for blocks, streams, layers in ((2, 2, 24), (3, 4, 16), (5, 8, 32)):
        sizes = {size: streams * layers / size + (streams + 2) * size for size in range(1, layers + 1)}
        assert sizes[layers_of_block("auto", streams, layers)] <= 1.02 * min(sizes.values()), blocks
    assert [layers_of_block(value, 4, 8) for value in ("none", "layer", 3, "3")] == [0, 1, 3, 3]


def test_sublayers_do_not_run_again() -> None:
    model = random_model(stream_recompute=100)
    calls = []
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp, layer.input_layernorm):
            part.register_forward_hook(lambda *_: calls.append(1))
    loss = loss_of(model, token_ids(model))
    before = len(calls)
    loss.backward()
    assert before == len(calls) == 9


def test_backward_twice_and_in_parts() -> None:
    model = random_model(layers=4)
    ids = token_ids(model)
    early, late = model.model.layers[0].attn_hc.weight, model.model.layers[3].ffn_hc.weight
    results = []
    for blocks in ("none", 2, 4):
        model.config.hc_stream_recompute = blocks
        loss = loss_of(model, ids)
        ask = lambda *leaves: torch.autograd.grad(loss, leaves, retain_graph=True)  # noqa: B023, E731
        results.append([*ask(late), *ask(early), *ask(early, late), *ask(late)])
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            for _ in range(2):
                loss.backward()
    for found in results[1:]:
        assert all(map(torch.equal, found, results[0]))


@pytest.mark.parametrize("trained", ["attn_hc", "ffn_hc", "layers.2", "layers.0.", "self_attn", "lm_head"])
def test_with_most_of_the_model_frozen(trained) -> None:
    model = random_model(layers=4)
    ids = token_ids(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    expected = gradients(model, ids)
    assert len(expected) > 1
    for blocks in ("layer", 4):
        model.config.hc_stream_recompute = blocks
        assert_same(gradients(model, ids), expected)


def test_autocast() -> None:
    model = random_model()
    ids = token_ids(model)
    context = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    expected = gradients(model, ids, context)
    model.config.hc_stream_recompute = 3
    assert_same(gradients(model, ids, context), expected)


def test_streams_that_somebody_changes_begin_a_block() -> None:
    """By hooks between layers, in place or not."""
    model = random_model(layers=4)
    ids = token_ids(model)
    changes = [lambda streams: 1.5 * streams, lambda streams: streams.clone(), lambda streams: streams.detach()]
    for change in changes:
        handle = model.model.layers[1].register_forward_hook(lambda _, __, streams, change=change: change(streams))
        model.config.hc_stream_recompute = "none"
        expected = gradients(model, ids)
        model.config.hc_stream_recompute = 4
        assert_same(gradients(model, ids), expected)
        assert saved_streams(model, ids) == 1
        handle.remove()
    for change in (lambda streams: streams.mul_(2), lambda streams: streams.detach().mul_(2)):
        handle = model.model.layers[1].register_forward_hook(
            lambda _, __, streams, change=change: (change(streams), streams)[1]
        )
        model.config.hc_stream_recompute = "none"
        expected = gradients(model, ids)
        model.config.hc_stream_recompute = 4
        assert_same(gradients(model, ids), expected)
        handle.remove()


def test_recording_and_other_hooks() -> None:
    model = random_model()
    ids = token_ids(model)
    with record_mappings(model) as expected:
        loss_of(model, ids)
    model.config.hc_stream_recompute = "layer"
    with record_mappings(model) as records:
        found = gradients(model, ids, output_hidden_states=True)
    assert found.keys() > {"loss"}
    assert records.keys() == expected.keys()
    assert all(torch.equal(records[name].h_res, expected[name].h_res) for name in expected)


def test_forwards_without_gradients_are_untouched() -> None:
    model = random_model(stream_recompute=2).eval()
    ids = token_ids(model)
    with torch.no_grad():
        logits = model(ids).logits
    generated = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    model.config.hc_stream_recompute = "none"
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, logits)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0), generated)


def test_nothing_outlives_the_graph() -> None:
    model = random_model(stream_recompute=3)
    ids, outputs = token_ids(model), []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _, __, out: outputs.append(weakref.ref(out)))
    gc.disable()
    try:
        loss_of(model, ids)  # never differentiated
        loss_of(model, ids).backward()
        assert len(outputs) == 6
        assert [ref() for ref in outputs] == [None] * 6
    finally:
        gc.enable()


def test_branch_outputs_must_not_change() -> None:
    model = random_model(stream_recompute=3)
    outputs = []
    model.model.layers[1].mlp.register_forward_hook(lambda _, __, out: outputs.append(out))
    loss = loss_of(model, token_ids(model))
    outputs[0].data.add_(0)
    outputs[0].detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_higher_derivatives_are_refused() -> None:
    model = random_model(stream_recompute="layer")
    model.set_attn_implementation("eager")
    ids = token_ids(model)
    with pytest.raises(RuntimeError, match=r"higher order need all streams.*hc_stream_recompute .*'none'"):
        torch.autograd.grad(loss_of(model, ids), model.lm_head.weight, create_graph=True)
        torch.autograd.grad(loss_of(model, ids), model.model.embed_tokens.weight, create_graph=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_is_refused(reentrant) -> None:
    model = random_model(stream_recompute="layer")
    ids = token_ids(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with pytest.raises(ValueError, match=r"stream_recompute must be 'none' with gradient checkpointing.*got 'layer'"):
        loss_of(model, ids)
    loss_of(model.eval(), ids)
    model.train().gradient_checkpointing_disable()
    loss_of(model, ids).backward()


def test_reference_kernel_keeps_what_autograd_keeps() -> None:
    model = random_model()
    ids = token_ids(model)
    for module in model.modules():
        if isinstance(module, HyperConnection):
            module.kernel = "reference"
    expected = gradients(model, ids)
    model.config.hc_stream_recompute = 2
    assert_same(gradients(model, ids), expected)


def test_under_a_compiler_the_option_changes_nothing() -> None:
    model = random_model(layers=1)  # one more takes seconds, and a block has its two branches as it is
    ids = token_ids(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = gradients(compiled, ids)
    model.config.hc_stream_recompute = 2
    assert_same(gradients(compiled, ids), expected)


def test_in_a_configuration(tmp_path) -> None:
    model = random_model(stream_recompute=2)
    assert model.config.hc_stream_recompute == 2
    model.config.hc_stream_recompute = "auto"
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.hc_stream_recompute == "auto"
    assert loaded.model.layers[0].hc_options == model.model.layers[0].hc_options
    changed = AutoModelForCausalLM.from_pretrained(tmp_path, hc_stream_recompute="3")
    assert changed.config.hc_stream_recompute == 3
    loaded.config.hc_stream_recompute = "often"
    with pytest.raises(ValueError, match=r"stream_recompute must be 'none', .*; got 'often'"):
        loaded(token_ids(model))
    config = copy.deepcopy(model.config).to_dict()
    del config["hc_stream_recompute"]
    assert type(model.config).from_dict(config).hc_stream_recompute == "none"


@pytest.mark.parametrize("value", [0, -1, True, 1.5, None, "0", "two", [1]], ids=str)
def test_wrong_values(value) -> None:
    with pytest.raises(ValueError, match="stream_recompute must be 'none', 'layer', 'auto' or the number of layers"):
        read_recompute(value)
    with pytest.raises(ValueError, match="hc_stream_recompute must be"):
        KromHCConfig(backbone_config=configurations("llama")[0], hc_stream_recompute=value)


def test_adapters() -> None:
    from peft import LoraConfig, get_peft_model

    results = []
    for blocks in ("none", 3):
        torch.manual_seed(0)
        base = make_model(configurations("llama")[0])
        base = get_peft_model(base, LoraConfig(target_modules=["q_proj", "down_proj"]), adapter_name="low_rank")
        model = get_peft_model(base, KromHCPeftConfig(stream_recompute=blocks), adapter_name="streams").train()
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "_hc." in name or "lora" in name:
                parameter.requires_grad_(True)
                parameter.data += 0.1 * torch.randn_like(parameter)
        ids = torch.arange(40).view(2, 20) + 3
        results.append(gradients(model, ids))
        assert saved_streams(model.base_model.model, ids) == (0 if blocks == 3 else 5)
    assert len(results[0]) > 12
    assert_same(results[1], results[0])


def trained(folder, model):
    trainer = make_trainer(folder, model)
    trainer.train()
    return trainer


def test_trainer(tmp_path) -> None:
    found = []
    for blocks in ("none", "auto"):
        torch.manual_seed(0)
        model = apply_hyper_connections(make_model(configurations("llama")[0]), stream_recompute=blocks)
        found.append(losses(trained(tmp_path / str(blocks), model)))
    assert found[0] == found[1]
    assert len(found[0]) > 1


def test_memory_in_proportion() -> None:
    """What all hyper-connections of a block save beside branch outputs: its first streams, and numbers per token."""
    width, n, tokens = 64, 4, 50
    connections = [HyperConnection(width, n, branch_index=i) for i in range(6)]

    def run(branches: int) -> int:
        kept: dict[int, int] = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        first = torch.randn(1, tokens, n, width, requires_grad=True)
        streams, outputs, parameters = first, [], [p for c in connections for p in c.parameters()]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            for connection in connections:
                branch_input, write = connection(streams, branches)
                outputs.append(branch_input.detach().requires_grad_())
                streams = write(outputs[-1])
        for tensor in parameters + outputs:
            kept.pop(tensor.untyped_storage().data_ptr(), None)
        return sum(kept.values()) // (4 * tokens)

    numbers = prod((n, n)) + n + 10 + 1  # h_res, h_post, products, squares
    assert run(6) <= n * width + 6 * numbers
    assert run(3) <= 2 * n * width + 6 * numbers
    assert run(0) >= 6 * n * width
