"""Streams in a range of decoder layers: everything else stays the plain family, and the whole computes the same."""

import copy

import pytest
import torch
from support.connected import same_gradients_checkpointed
from support.ranged import connected_positions, logits, ranged, six_layers
from support.tiny import configurations, make_model, token_ids, variants
from torch import nn

from kromhc_hf import (
    apply_hyper_connections,
    hyper_connection_state_dict,
    remove_hyper_connections,
)
from kromhc_hf.modeling.layer_fit import layer_specs


VARIANTS = [pytest.param(name, position, id=label) for label, name, position in variants()]
FAMILIES = ("llama", "gpt2", "opt", "gemma2", "mamba", "qwen3_next")
EPS = torch.finfo(torch.float32).eps


def family_model(model_type: str):
    return make_model(configurations(model_type)[0])


@pytest.mark.parametrize(("model_type", "position"), VARIANTS)
def test_a_middle_layer_of_every_family_and_back(model_type, position):
    model = make_model(configurations(model_type)[position])
    native, classes = logits(model), [type(module) for module in model.modules()]
    exact = all(spec.exact for spec in layer_specs(model.config, model_type))
    apply_hyper_connections(model, layers=(1, 2))
    assert connected_positions(model) == [1]
    converted = logits(model)
    # Where the family sums in another order, as for whole models in test_family_models.py.
    limit = 0 if exact else 4 * EPS * native.abs().max()
    assert (converted - native).abs().max() <= limit
    remove_hyper_connections(model)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(logits(model), native)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_streams": 3, "variant": "tbp"},
        {"variant": "mhc", "readout": "softmax"},
        {"readout": "sigmoid"},
        {"readout": "attention", "stream_embedding": True},
        {"dynamic": False},
        {"num_streams": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("layers", [(0, 2), (2, 4), (-2, None)], ids=["first", "middle", "last"])
def test_bitwise_with_every_option(layers, options, dtype):
    model = six_layers().to(dtype)
    native = logits(model)
    apply_hyper_connections(model, layers=layers, **options)
    assert torch.equal(logits(model), native)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_generation_with_cache_and_left_padding(model_type, cache):
    model = family_model(model_type)
    ids = token_ids(model.config)
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    options = {} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
    options |= {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    native = model.generate(ids, attention_mask=mask, **options)
    apply_hyper_connections(model, layers=(1, 2))
    converted = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(converted.sequences, native.sequences)
    assert all(torch.equal(one, other) for one, other in zip(converted.logits, native.logits))


def test_three_models_one_after_the_other():
    """The layers in front, those with streams and those behind are what they are in models of their own."""
    model, seen = ranged((2, 4), readout="attention", stream_embedding=True), {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "expand_hc" in name or "readout_hc" in name:
                parameter.normal_()
    for i in (2, 3):
        layer = model.model.layers[i]
        layer.register_forward_hook(lambda _, args, out, i=i: seen.update({i: (args[0], out)}))
    result = logits(model)
    assert [seen[2][0].dim(), seen[2][1].dim(), seen[3][0].dim(), seen[3][1].dim()] == [3, 4, 4, 3]

    def alone(like, layers, norm):
        part = copy.deepcopy(like)
        part.model.layers = nn.ModuleList(copy.deepcopy(model.model.layers[i]) for i in layers)
        for module in part.modules():
            if hasattr(module, "config"):
                module.config.num_hidden_layers = len(layers)
        part.model.norm = model.model.norm if norm else nn.Identity()
        return part

    plain, ids = six_layers(), token_ids(model.config)
    options = {"readout": "attention", "stream_embedding": True}
    streams = apply_hyper_connections(six_layers(), **options)
    with torch.no_grad():
        front = alone(plain, (0, 1), norm=False).model(ids, use_cache=False).last_hidden_state
        assert torch.equal(front, seen[2][0])
        middle = alone(streams, (2, 3), norm=False)
        for layer in middle.model.layers:
            layer.hc_options = streams.config.stream_options()
        middle = middle.model(inputs_embeds=front, use_cache=False).last_hidden_state
        assert torch.equal(middle, seen[3][1])
        behind = alone(plain, (4, 5), norm=True).model(inputs_embeds=middle, use_cache=False).last_hidden_state
        assert torch.equal(model.lm_head(behind), result)


def test_only_layers_in_the_range_change():
    model = ranged((2, 4), stream_embedding=True, readout="softmax")
    keys = {key for key in model.state_dict() if "_hc." in key}
    assert {key.split(".")[2] for key in keys} == {"2", "3"}
    assert {key for key in keys if "expand_hc" in key} == {"model.layers.2.expand_hc.weight"}
    assert {key for key in keys if "readout_hc" in key} == {"model.layers.3.readout_hc.bias"}
    assert [type(layer).__name__ for layer in model.model.layers[:3]] == ["LlamaDecoderLayer"] * 2 + [
        "KromHCLlamaDecoderLayer"
    ]
    assert {"LlamaDecoderLayer", "KromHCLlamaDecoderLayer"} <= set(model._no_split_modules)
    # Counted over the model: the same hyper-connections as where all layers have them.
    whole = hyper_connection_state_dict(apply_hyper_connections(six_layers(), 4))
    part = hyper_connection_state_dict(apply_hyper_connections(six_layers(), 4, layers=(2, 4)))
    assert part.keys() == {key for key in whole if key.split(".")[2] in "23"}
    assert all(torch.equal(part[key], whole[key]) for key in part)
    shown = repr(apply_hyper_connections(six_layers(), layers=(2, 4)))
    assert "(0-1): 2 x LlamaDecoderLayer" in shown
    assert "(2-3): 2 x KromHCLlamaDecoderLayer" in shown


@pytest.mark.parametrize("readout", ["mean", "norm_sum"])
@pytest.mark.parametrize("layers", [(0, 2), (2, 4), (3, None), (5, 6)], ids=str)
def test_early_exit_at_every_depth(layers, readout):
    if readout == "norm_sum" and layers[1] in (2, 4):
        pytest.skip("norm_sum goes up to the last layer")
    model = ranged(layers, readout=readout, init="paper").eval()
    prompt = token_ids(model.config, batch=1)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = prompt
    with torch.no_grad():
        for _ in range(6):
            expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(prompt, **options), expected)
    if readout == "norm_sum":
        with pytest.raises(
            ValueError, match=r"must run up to the last one, 0; got streams in . to 5. .*leave early behind"
        ):
            model.generate(prompt, assistant_early_exit=1, **options)
        model.config.num_hidden_layers = 6  # generate has lowered it
    for depth in range(layers[0] + 1 if readout == "norm_sum" else 1, 6):
        assert torch.equal(model.generate(prompt, assistant_early_exit=depth, **options), expected), depth


def test_hidden_states_are_read_out():
    model = ranged((2, 4))
    plain = six_layers()
    states = model(token_ids(model.config), output_hidden_states=True).hidden_states
    expected = plain(token_ids(model.config), output_hidden_states=True).hidden_states
    assert [state.shape for state in states] == [state.shape for state in expected]
    assert all(torch.equal(one, other) for one, other in zip(states[:3], expected))
    assert not torch.equal(states[3], expected[3])


def test_gradients_with_and_without_checkpointing():
    model = ranged((2, 4)).train()
    plain = same_gradients_checkpointed(model)
    assert all(gradient.abs().sum() > 0 for gradient in plain.values())


def test_compiled_in_one_graph():
    torch.compiler.reset()
    model = ranged((2, 4)).eval()
    result, expected = logits(torch.compile(model, fullgraph=True, backend="aot_eager")), logits(model)
    # The compiled kernel sums over streams in another order, which four branches and the logits pass on.
    assert torch.allclose(result, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
