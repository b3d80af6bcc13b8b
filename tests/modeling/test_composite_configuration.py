"""Configurations and models of several modalities: nested, made from scratch, pickled, with other heads."""

import copy
import pickle

import pytest
import torch
from support.composite import CASES, composite_configuration, composite_inputs, make_composite
from support.tiny import configurations, separate_streams
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, LlavaConfig

from kromhc_hf import (
    KromHCConfig,
    KromHCForCausalLM,
    KromHCForImageTextToText,
    KromHCForMultimodalLM,
    KromHCForSequenceClassification,
    KromHCModel,
    apply_hyper_connections,
    has_hyper_connections,
    remove_hyper_connections,
)


def llava_config(**options):
    return KromHCConfig(backbone_config=composite_configuration("llava", **CASES["llava"][1]), **options)


def test_the_fields_are_in_the_text_part_and_reach_through():
    config = llava_config(hc_num_streams=3)
    assert type(config).__name__ == "KromHCLlavaConfig"
    assert isinstance(config, LlavaConfig)
    assert config.text_key == "text_config"
    assert type(config.text_config).__name__ == "KromHCLlamaConfig"
    assert config.hc_num_streams == config.text_config.hc_num_streams == 3
    assert not any(name.startswith("hc_") for name in config.to_dict())
    assert config.to_dict()["text_config"]["hc_num_streams"] == 3
    config.hc_num_streams = 2
    assert config.text_config.hc_num_streams == 2
    plain = config.to_backbone_config()
    assert type(plain) is LlavaConfig
    assert type(plain.text_config).__name__ == "LlamaConfig"
    assert "hc_num_streams" not in plain.text_config.to_dict()
    again = KromHCConfig.from_dict(config.to_dict())
    assert type(again) is type(config)
    assert again.stream_options() == config.stream_options()


def test_options_and_fields_are_checked():
    with pytest.raises(ValueError, match="hc_num_streams must be"):
        llava_config(hc_num_streams=0)
    with pytest.raises(ValueError, match="hc_streams is not a field of KromHCLlavaConfig"):
        llava_config(hc_streams=4)
    with pytest.raises(ValueError, match="num_streams must be given as hc_num_streams"):
        llava_config(num_streams=4)
    config = llava_config()
    config.hc_num_streams = -1
    with pytest.raises(ValueError, match="hc_num_streams must be"):
        KromHCForImageTextToText(config)
    assert llava_config(image_seq_length=7).image_seq_length == 7


def test_parts_beside_a_base():
    """What is given beside a base reaches the part that it belongs to, or is refused."""
    with pytest.raises(ValueError, match=r"num_hidden_layers is a field of text_config, .* Set backbone_config"):
        llava_config(num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"text_config must be a configuration .*; got a dict\. Change"):
        llava_config(text_config={"num_hidden_layers": 2})
    plain = configurations("granite")[0]
    assert llava_config(text_config=plain).text_config.model_type == "kromhc_granite"
    text = KromHCConfig(backbone_config=plain, hc_num_streams=3, hc_readout="softmax")
    config = llava_config(text_config=text, hc_num_streams=2)
    assert (config.hc_num_streams, config.hc_readout) == (2, "softmax")


def test_a_text_model_that_is_refused_refuses_the_whole():
    config = composite_configuration("llava", text_config={"model_type": "bert"} | SMALL_BERT)
    with pytest.raises(ValueError, match="model_type 'bert' is not supported: the norm follows the residual addition"):
        KromHCConfig(backbone_config=config)


SMALL_BERT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def test_another_text_model_than_the_usual_one(tmp_path):
    text = configurations("granite")[0].to_dict()
    config = composite_configuration("llava", text_config=text, vision_feature_layer=-1)
    model = KromHCForImageTextToText(KromHCConfig(backbone_config=config)).eval()
    assert type(model.model.language_model).__name__ == "KromHCGraniteModel"
    with torch.no_grad():
        separate_streams(model)
        inputs = composite_inputs("llava", model)
        expected = model(**inputs).logits
        model.save_pretrained(tmp_path)
        loaded = KromHCForImageTextToText.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(**inputs).logits, expected)


def test_from_scratch_with_every_face():
    model = KromHCForImageTextToText(llava_config(hc_init="paper", hc_readout="softmax", hc_stream_embedding=True))
    assert isinstance(model, KromHCForMultimodalLM)
    assert not isinstance(model, KromHCForCausalLM)
    assert has_hyper_connections(model.model)
    assert isinstance(model.model, KromHCModel)
    output = model(**composite_inputs("llava", model), labels=torch.zeros(2, 22, dtype=torch.long))
    output.loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "_hc." in n)
    with pytest.raises(ValueError, match="llava has no model for AutoModelForCausalLM"):
        KromHCForCausalLM(llava_config())
    # What is a causal language model to transformers is one here.
    config = KromHCConfig(backbone_config=composite_configuration("gemma3", mm_tokens_per_image=4))
    assert isinstance(KromHCForCausalLM(config), KromHCForImageTextToText)


@torch.no_grad()
def test_modules_go_on_sharing_the_parts_of_the_configuration():
    model = make_composite("llava")
    before = model.config
    apply_hyper_connections(model)
    assert model.model.config is model.config
    assert model.model.language_model.config is model.config.text_config
    assert model.model.vision_tower.config is model.config.vision_config
    model.set_attn_implementation("eager")
    assert model.model.language_model.layers[0].self_attn.config._attn_implementation == "eager"
    remove_hyper_connections(model)
    assert model.model.language_model.config is model.config.text_config
    assert type(model.config) is type(before)


@pytest.mark.parametrize("model_type", ["llava", "qwen3_vl", "blip-2"])
@torch.no_grad()
def test_pickled_and_copied(model_type):
    model = apply_hyper_connections(make_composite(model_type))
    separate_streams(model)
    inputs = composite_inputs(model_type, model)
    # Before it runs: towers that record their states then hold functions that cannot be pickled.
    others = (pickle.loads(pickle.dumps(model)), copy.deepcopy(model))
    expected = model(**inputs, use_cache=False).logits
    for other in others:
        assert [type(part) for part in other.modules()] == [type(part) for part in model.modules()]
        assert torch.equal(other(**inputs, use_cache=False).logits, expected)
        remove_hyper_connections(other)


@torch.no_grad()
def test_a_base_model_and_a_classifier(tmp_path):
    config = composite_configuration("gemma3", mm_tokens_per_image=4)
    for auto, face in ((AutoModel, KromHCModel), (AutoModelForSequenceClassification, KromHCForSequenceClassification)):
        model = auto.from_config(copy.deepcopy(config)).eval()
        inputs = composite_inputs("gemma3", model)
        native = model(**inputs)[0]
        apply_hyper_connections(model)
        assert isinstance(model, face)
        assert torch.equal(model(**inputs)[0], native)
        separate_streams(model)
        expected = model(**inputs)[0]
        model.save_pretrained(tmp_path / face.__name__)
        loaded, info = auto.from_pretrained(tmp_path / face.__name__, output_loading_info=True)
        assert not info["missing_keys"]
        assert type(loaded) is type(model)
        assert torch.equal(loaded.eval()(**inputs)[0], expected)


def test_the_text_part_by_itself_is_a_family_like_any_other(tmp_path):
    llava_config().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)).__name__ == "KromHCLlavaConfig"
    text = llava_config(hc_num_streams=5).text_config
    text.save_pretrained(tmp_path / "text")
    assert AutoConfig.from_pretrained(tmp_path / "text").hc_num_streams == 5
