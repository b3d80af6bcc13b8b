"""Ranges of layers with streams: how they are given, kept and refused, and what goes by them beside the forward."""

import copy
import json

import pytest
import torch
from support.ranged import connected_positions, logits, ranged, six_layers
from support.tiny import separate_streams, token_ids
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from kromhc_hf import (
    KromHCConfig,
    KromHCForCausalLM,
    StreamOptions,
    apply_hyper_connections,
    count_parameters,
    grow_streams,
    inspect_model,
    load_hyper_connections,
    record_mappings,
    remove_hyper_connections,
    save_hyper_connections,
)


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
        ((4, 2), r"at least one .*Use for example layers='4:6', the last third"),
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
    with pytest.raises(ValueError, match=r"go up to the last one, 5; got layers=\(2, 4\). Use layers='2:'"):
        apply_hyper_connections(six_layers(), layers=(2, 4), **options)
    with pytest.raises(ValueError, match=r"got hc_layers=\(2, 4\). Use hc_layers='2:', or hc_readout='mean'"):
        KromHCConfig(backbone_config=six_layers().config, hc_layers=(2, 4), hc_readout="norm_sum", hc_init="paper")
    model = ranged((4, 6), **options)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)
    model.model.layers.append(six_layers().model.layers[5])
    model.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="must run up to the last one, 6; got streams in 4 to 5"):
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
