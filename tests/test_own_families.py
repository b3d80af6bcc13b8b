"""Which rows can be registered, and the configurations that they lead to."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from support.bases.amber.configuration_amber import AmberConfig
from support.outside import AMBER, make_outside
from transformers import AutoConfig, AutoModelForCausalLM

from kromhc_hf import (
    KromHCConfig,
    apply_hyper_connections,
    register_family,
    remove_hyper_connections,
    unregister_family,
)
from kromhc_hf.modeling.outside_families import REGISTERED
from kromhc_hf.rows import LayerSpec, Step, Sublayer


pytestmark = pytest.mark.usefixtures("nothing_registered")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("llama", AMBER), "native class is supported"),
        (("hrm_text", AMBER), "'hrm_text' is not supported: two stacks"),
        (("two words", AMBER), "must be a name such as"),
        (("mine", "self_attn"), "row must be a LayerSpec"),
        (("mine", ()), "row must be a LayerSpec"),
    ],
)
def test_what_no_row_can_be_registered_for(arguments, message):
    with pytest.raises(ValueError, match=message):
        register_family(*arguments)
    assert not REGISTERED
    with pytest.raises(ValueError, match="one that was registered"):
        unregister_family(arguments[0])


@pytest.mark.parametrize("name", ["mlp", "two words_hc", "expand_hc", "readout_hc"])
def test_the_name_of_a_step_says_what_it_is(name):
    with pytest.raises(ValueError, match=rf"ends in '_hc', and none of expand_hc, readout_hc; got '{name}'"):
        Step(name, (Sublayer("mlp"),))


def test_steps_are_told_apart():
    step = Step("ffn_hc", (Sublayer("mlp"),))
    with pytest.raises(ValueError, match="each a name of its own; got ffn_hc, ffn_hc"):
        LayerSpec((step, step))
    with pytest.raises(ValueError, match="at least one step"):
        LayerSpec(())
    with pytest.raises(ValueError, match="'ffn_hc' has none"):
        Step("ffn_hc", ())


def test_a_row_that_is_taken_back_holds_no_longer(tmp_path):
    """But for the models that have hyper-connections by it."""
    register_family("amber", AMBER)
    model, tokens = apply_hyper_connections(make_outside("amber")), torch.arange(6)[None]
    unregister_family("amber")
    with pytest.raises(ValueError, match="supported families; got 'amber'"):
        apply_hyper_connections(make_outside("amber"))
    expected = model(tokens).logits
    assert torch.equal(copy.deepcopy(model)(tokens).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(tokens).logits, expected)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="supported families; got 'amber'"):
        apply_hyper_connections(remove_hyper_connections(model))
    # A saved model brings its row along.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(loaded(tokens).logits, expected)


def test_another_row_takes_the_place_of_the_first(tmp_path):
    first = replace(AMBER, layer_class="AmberLayer")
    register_family("amber", first)
    model = apply_hyper_connections(make_outside("amber"))
    register_family("amber", AMBER)
    other = apply_hyper_connections(make_outside("amber"))
    assert [{layer.spec for layer in each.model.layers} for each in (model, other)] == [{first}, {AMBER}]
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="another one has been registered for 'kromhc_amber' since"):
        model.save_pretrained(tmp_path / "model")
    register_family("amber", first)
    model.save_pretrained(tmp_path / "model")


def test_configurations_are_made_by_the_face():
    register_family("amber", AMBER)
    config = KromHCConfig(backbone_config=AmberConfig(), hc_num_streams=2)
    assert type(config).__name__ == "KromHCAmberConfig"
    assert isinstance(config, AmberConfig)
    assert type(config.to_backbone_config()) is AmberConfig
    with pytest.raises(ValueError, match=r"AmberConfig|amber"):
        AutoConfig.for_model("kromhc_amber")
