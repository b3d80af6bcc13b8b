"""Which rows can be registered, and the configurations that they lead to."""

import pytest
from support.bases.amber.configuration_amber import AmberConfig
from support.outside import AMBER
from transformers import AutoConfig

from kromhc_hf import KromHCConfig, register_family, unregister_family
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


def test_configurations_are_made_by_the_face():
    register_family("amber", AMBER)
    config = KromHCConfig(backbone_config=AmberConfig(), hc_num_streams=2)
    assert type(config).__name__ == "KromHCAmberConfig"
    assert isinstance(config, AmberConfig)
    assert type(config.to_backbone_config()) is AmberConfig
    with pytest.raises(ValueError, match=r"AmberConfig|amber"):
        AutoConfig.for_model("kromhc_amber")
