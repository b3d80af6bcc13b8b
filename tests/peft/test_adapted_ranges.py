"""Adapters of hyper-connections in a range of decoder layers, each in its own."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.adapters import adapter_config, perturb_hyper_connections
from support.ranged import logits, six_layers
from support.tiny import token_ids
from transformers import LlamaForCausalLM

from kromhc_hf import adapter_to_model, apply_hyper_connections, model_to_adapter, record_mappings


RANGES = {"middle": (2, 4), "last": (3, 6), "all": None}


def adapted(**options):
    names = iter(RANGES.items())
    name, layers = next(names)
    model = get_peft_model(six_layers(), adapter_config(num_streams=4, layers=layers, **options), name)
    for name, layers in names:
        model.add_adapter(name, adapter_config(num_streams=2, layers=layers, **options))
    return model


@pytest.mark.parametrize("options", [{}, {"readout": "attention", "stream_embedding": True}], ids=["plain", "ends"])
def test_adapters_of_several_ranges_on_one_base(options, tmp_path):
    native, model = logits(six_layers()), adapted(**options)
    for name in RANGES:
        model.set_adapter(name)
        assert torch.equal(logits(model), native)
    perturb_hyper_connections(model)
    expected = {}
    for name, layers in RANGES.items():
        model.set_adapter(name)
        expected[name] = logits(model)
        assert not torch.equal(expected[name], native)
        states = model(token_ids(model.config), output_hidden_states=True).hidden_states
        assert {state.dim() for state in states} == {3}
        with record_mappings(model, token_ids(model.config)) as records:
            assert {int(branch.split(".")[1]) for branch in records} == set(range(*(layers or (0, 6))))
    with model.disable_adapter():
        assert torch.equal(logits(model), native)
    model.save_pretrained(tmp_path)
    six_layers().save_pretrained(tmp_path / "base")
    for name, layers in RANGES.items():
        loaded = PeftModel.from_pretrained(six_layers(), tmp_path / name)
        assert torch.equal(logits(loaded), expected[name])
        full = adapter_to_model(loaded)
        assert torch.equal(logits(full), expected[name])
        assert full.config.hc_layers == layers
        model_to_adapter(full, tmp_path / "back", tmp_path / "base")
        assert torch.equal(logits(PeftModel.from_pretrained(six_layers(), tmp_path / "back")), expected[name])
    model.set_adapter("last")
    assert torch.equal(logits(adapter_to_model(model)), expected["last"])
    plain = adapted(**options).unload()
    assert [type(module) for module in plain.modules()] == [type(module) for module in six_layers().modules()]
    assert torch.equal(logits(plain), native)


def test_open_ends_are_counted_on_the_base():
    model = get_peft_model(six_layers(), adapter_config(layers="-2:"))
    config = model.peft_config["default"]
    assert config.layers == (4, 6)
    assert config.target_modules == r"model\.layers\.(4|5)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (4, 9)}, "at least one of the 6 decoder layers"),
        ({"layers": (0, 2), "readout": "norm_sum", "init": "paper"}, "must go up to the last one, 5"),
    ],
    ids=["range", "norm_sum"],
)
def test_refused_ranges_leave_the_base_alone(options, message):
    base = six_layers()
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, adapter_config(**options))
    assert type(base) is LlamaForCausalLM
    assert torch.equal(logits(base), logits(six_layers()))


def test_a_base_with_a_layer_of_another_model_is_refused():
    base = six_layers()
    base.model.layers[0] = apply_hyper_connections(six_layers()).model.layers[0]
    with pytest.raises(ValueError, match="must be a plain model; LlamaForCausalLM has hyper-connections of its own"):
        get_peft_model(base, adapter_config())
