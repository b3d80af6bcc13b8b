"""Streams in a range of decoder layers: everything else stays the plain family, and the whole computes the same."""

import copy
import json

import pytest
import torch
from support.connected import tiny_llama
from support.tiny import configurations, make_model, separate_streams, token_ids, variants
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from kromhc_hf import (
    KromHCConfig,
    KromHCForCausalLM,
    StreamOptions,
    apply_hyper_connections,
    count_parameters,
    grow_streams,
    hyper_connection_state_dict,
    inspect_model,
    load_hyper_connections,
    record_mappings,
    remove_hyper_connections,
    save_hyper_connections,
)
from kromhc_hf.modeling.connection_plan import find_decoder
from kromhc_hf.modeling.decoder_layer import HyperConnectedLayer
from kromhc_hf.modeling.layer_fit import layer_specs


VARIANTS = [pytest.param(name, position, id=label) for label, name, position in variants()]
FAMILIES = ("llama", "gpt2", "opt", "gemma2", "mamba", "qwen3_next")
EPS = torch.finfo(torch.float32).eps


def family_model(model_type: str, **fields):
    config = configurations(model_type)[0]
    for name, value in fields.items():
        setattr(config, name, value)
    return make_model(config)


def six_layers():
    return family_model("llama", num_hidden_layers=6)


def ranged(layers=(2, 4), **options):
    """Six layers of which some have streams that differ."""
    torch.manual_seed(0)
    model = apply_hyper_connections(six_layers(), layers=layers, **options)
    separate_streams(model)
    return model


def logits(model, **arguments):
    with torch.no_grad():
        return model(input_ids=token_ids(model.config), use_cache=False, **arguments).logits


def connected_positions(model) -> list[int]:
    return [i for i, layer in enumerate(find_decoder(model).layers) if isinstance(layer, HyperConnectedLayer)]


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
    for depth in range(1, 6):
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
    ids = token_ids(model.config)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain = gradients()
    model.gradient_checkpointing_enable()
    checkpointed = gradients()
    assert all(torch.equal(checkpointed[name], plain[name]) for name in plain)
    assert all(gradient.abs().sum() > 0 for gradient in plain.values())


def test_compiled_in_one_graph():
    torch.compiler.reset()
    model = ranged((2, 4)).eval()
    result, expected = logits(torch.compile(model, fullgraph=True, backend="aot_eager")), logits(model)
    # The compiled kernel sums over streams in another order, which four branches and the logits pass on.
    assert torch.allclose(result, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("given", "kept"),
    [((2, 4), [2, 4]), ("-2:", [4, 6]), ([None, -4], [0, 2]), (":2", [0, 2]), ("all", None), (":", None), (None, None)],
    ids=str,
)
def test_stored_as_positions_and_loaded(given, kept, tmp_path):
    model = apply_hyper_connections(six_layers(), layers=given)
    separate_streams(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hc_layers"] == kept
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.hc_layers == (None if kept is None else tuple(kept))
    assert connected_positions(loaded) == list(range(*(kept or (0, 6))))
    assert torch.equal(logits(loaded), logits(model))
    assert KromHCConfig(backbone_config=six_layers().config, hc_layers=given).hc_layers == loaded.config.hc_layers
    native = LlamaForCausalLM.from_pretrained(tmp_path, config=loaded.config.to_backbone_config())
    assert not hasattr(native.config, "hc_layers")


def test_a_file_without_the_field_has_streams_everywhere(tmp_path):
    apply_hyper_connections(six_layers()).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content.pop("hc_layers")
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert connected_positions(AutoModelForCausalLM.from_pretrained(tmp_path)) == [*range(6)]
    assert AutoConfig.from_pretrained(tmp_path, hc_layers=[2, 4]).hc_layers == (2, 4)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (3, "layers must be None for all decoder layers, or a range"),
        (True, "layers must be None"),
        ("2-4", r"such as \(8, 12\), '8:12' or '-4:'; got '2-4'"),
        ("1:2:3", "got '1:2:3'"),
        ((1, 2, 3), r"got \(1, 2, 3\)"),
        ((1.0, 2), r"got \(1.0, 2\)"),
        ((False, 2), r"got \(False, 2\)"),
        ((2, 2), r"layers must be a range of at least one of the 6 decoder layers .* 0 to 5; got \(2, 2\)"),
        ((4, 2), r"at least one .*Use for example layers=\(4, 6\), the last third"),
        ((2, 7), "at least one of the 6"),
        ((-7, None), "at least one of the 6"),
        ((6, None), "at least one of the 6"),
        ((0, -6), "at least one of the 6"),
    ],
    ids=str,
)
def test_refused_ranges_leave_the_model_alone(layers, message):
    model = six_layers()
    native, config = logits(model), model.config
    with pytest.raises(ValueError, match=f"^{message}|^layers must.*{message}"):
        apply_hyper_connections(model, layers=layers)
    assert model.config is config
    assert type(model) is LlamaForCausalLM
    assert torch.equal(logits(model), native)
    with pytest.raises(ValueError, match="hc_layers must"):
        KromHCConfig(backbone_config=config, hc_layers=layers)


def test_a_readout_after_the_norm_goes_with_the_last_layer(tmp_path):
    options = {"readout": "norm_sum", "init": "paper"}
    with pytest.raises(ValueError, match=r"go up to the last one, 5; got layers=\(2, 4\). Use layers=\(2, None\)"):
        apply_hyper_connections(six_layers(), layers=(2, 4), **options)
    with pytest.raises(ValueError, match=r"got hc_layers=\(2, 4\). Use hc_layers=\(2, None\), or hc_readout='mean'"):
        KromHCConfig(backbone_config=six_layers().config, hc_layers=(2, 4), hc_readout="norm_sum", hc_init="paper")
    model = ranged((4, 6), **options)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)
    model.model.layers.append(six_layers().model.layers[5])
    model.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="must go up to the last one, 6; got 4 to 5"):
        logits(model)


def test_fewer_layers_than_the_range_needs(tmp_path):
    ranged((4, 6)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"hc_layers must be a range of at least one of the 4 decoder layers"):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=4)
    config = AutoConfig.from_pretrained(tmp_path)
    config.num_hidden_layers = 4
    with pytest.raises(ValueError, match=r"hc_layers must be a range .* 4 decoder layers"):
        KromHCForCausalLM(config)


def test_layers_are_dropped_and_replaced(tmp_path):
    model, plain = ranged((2, 4)), six_layers()
    layers = list(model.model.layers)

    def holding(*chosen, number=None):
        changed = copy.deepcopy(model)
        changed.model.layers = nn.ModuleList(copy.deepcopy(layer) for layer in chosen)
        changed.config.num_hidden_layers = number or len(chosen)
        return changed

    dropped = holding(*layers[1:])
    expected = logits(dropped)
    assert expected.dim() == 3
    with pytest.raises(
        ValueError, match=r"hc_layers=\(2, 4\), and they are 1 to 2 of 5. Set config.hc_layers = \(1, 3\)"
    ):
        dropped.save_pretrained(tmp_path)
    dropped.config.hc_layers = (1, 3)
    dropped.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)
    between = holding(*layers[:3], plain.model.layers[0], *layers[3:])
    with pytest.raises(ValueError, match="every decoder layer from 2 to 4 must have .*; layer 3 has none"):
        logits(between)
    shorter = holding(*layers[:3], *layers[4:])
    assert logits(shorter).dim() == 3
    assert connected_positions(remove_hyper_connections(shorter)) == []
    with pytest.raises(ValueError, match=r"layer 2 has none|Set config.hc_layers"):
        holding(*plain.model.layers[:3], layers[3], *layers[4:]).save_pretrained(tmp_path / "other")
    # A layer from a model where all have streams serves as well.
    donor = apply_hyper_connections(six_layers(), 4).model.layers[0]
    assert logits(holding(*layers[:2], donor, *layers[3:])).dim() == 3


def test_wrapped_layers():
    model = ranged((2, 4)).eval()
    expected = logits(model)
    for i in (0, 2, 3, 5):
        model.model.layers[i] = torch.compile(model.model.layers[i], backend="eager")
    # Compiled, the streams are read by another kernel.
    assert torch.allclose(logits(model), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_growing():
    model = ranged((2, 4))
    growth = grow_streams(model, 2)
    assert (growth.num_streams_before, growth.num_streams) == (4, 8)
    assert growth.max_difference < 1e-3
    assert connected_positions(model) == [2, 3]
    assert model.config.hc_layers == (2, 4)


def test_branches_have_their_true_numbers():
    model = ranged((2, 4))
    names = ["layers.2.attn_hc", "layers.2.ffn_hc", "layers.3.attn_hc", "layers.3.ffn_hc"]
    ids = token_ids(model.config, batch=1)
    with record_mappings(model, ids) as records:
        assert [*records] == names
    assert list(inspect_model(model, ids).to_dict()["branches"]) == names


def test_a_file_of_hyper_connections_alone(tmp_path):
    base = six_layers()
    base.save_pretrained(tmp_path / "base")
    model = apply_hyper_connections(base, layers="-2:")
    separate_streams(model)
    save_hyper_connections(model, tmp_path / "alone", base_model=str(tmp_path / "base"))
    loaded = load_hyper_connections(tmp_path / "alone")
    assert connected_positions(loaded) == [4, 5]
    assert torch.equal(logits(loaded), logits(model))


def test_counting_and_options():
    with pytest.raises(ValueError, match="layers must be left out where num_branches says"):
        count_parameters(32, layers=(0, 2))
    assert StreamOptions(layers=[2, -1]) == StreamOptions(layers="2:-1") == StreamOptions(layers=(2, -1))
    assert StreamOptions(layers="2:-1").layers_of(6) == range(2, 5)
    assert StreamOptions(layers="2:-1").in_model(6).layers == (2, 5)
    assert tiny_llama().config.num_hidden_layers == 3
