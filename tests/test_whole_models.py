"""Hyper-connections in a part of a plain model are refused before they could be lost."""

import copy

import pytest
import torch
from peft import get_peft_model
from support.adapters import adapter_config
from support.connected import connected, tiny_llama
from support.tiny import configurations, make_model
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaForCausalLM,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from kromhc_hf import apply_hyper_connections, grow_streams, has_hyper_connections, remove_hyper_connections
from kromhc_hf.whole_models import check_whole


VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def llava():
    text = configurations("llama")[0]
    config = LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_index=98)
    return LlavaForConditionalGeneration(config).eval()


def gemma3():
    text = configurations("gemma3_text")[0]
    config = Gemma3Config(vision_config=SiglipVisionConfig(**VISION), text_config=text, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("make", [llava, gemma3])
def test_the_text_model_of_a_composite(make, tmp_path):
    model = make()
    text = model.model.language_model
    keys, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(
        ValueError, match=rf"whole model; got the {type(text).__name__} inside a {type(model).__name__}"
    ):
        apply_hyper_connections(text)
    with pytest.raises(ValueError, match=rf"Give them to the {type(model).__name__}: apply_hyper_connections\(model\)"):
        apply_hyper_connections(model.model)
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == kinds
    # By itself it is a model like any other, but it cannot go back.
    model.model.language_model = apply_hyper_connections(copy.deepcopy(text))
    with pytest.raises(ValueError, match=r"lost when it is loaded again; model\.language_model\.layers\.0 has them"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model.model.language_model.save_pretrained(tmp_path / "part")
    assert has_hyper_connections(AutoModel.from_pretrained(tmp_path / "part"))
    remove_hyper_connections(model.model.language_model)
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"text model .* inside that shares the configuration of get_text_config\(\)"):
        apply_hyper_connections(model)


@pytest.mark.parametrize("make", [llava, gemma3])
def test_the_whole_of_a_composite(make, tmp_path):
    model = apply_hyper_connections(make())
    model.save_pretrained(tmp_path / "streams")
    loaded = type(model).from_pretrained(tmp_path / "streams")
    assert has_hyper_connections(loaded)
    assert has_hyper_connections(loaded.model.language_model)
    with pytest.raises(ValueError, match="already has hyper-connections"):
        apply_hyper_connections(model.model.language_model)
    with pytest.raises(ValueError, match="must be removed from the whole model"):
        remove_hyper_connections(model.model.language_model)
    assert has_hyper_connections(model)


@pytest.mark.parametrize("make", [tiny_llama, llava])
def test_a_part_does_not_grow_alone(make):
    model = apply_hyper_connections(make(), 2)
    part = model.model.language_model if make is llava else model.model
    with pytest.raises(ValueError, match=rf"must be grown in the whole model; .* inside a {type(model).__name__}"):
        grow_streams(part)
    assert model.config.hc_num_streams == part.config.hc_num_streams == 2
    assert grow_streams(model).num_streams == model.config.hc_num_streams == 4


def test_a_part_is_a_model_by_itself_where_the_whole_is_refused(monkeypatch):
    """As the thinker of the omni models, whose refusal gives the call on it."""
    model = llava()
    monkeypatch.setattr(model.config, "model_type", "qwen2_5_omni")
    monkeypatch.setattr(model.model.config.text_config, "model_type", "llava")
    with pytest.raises(ValueError, match=r"apply_hyper_connections: model\.thinker"):
        apply_hyper_connections(model)
    check_whole(model.model.language_model)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_the_base_of_a_model_with_a_head(model_type):
    model = make_model(configurations(model_type)[0])
    with pytest.raises(ValueError, match="Give them to the .*ForCausalLM|Give them to the GPT2LMHeadModel"):
        apply_hyper_connections(model.base_model)
    assert not any("_hc." in name for name in model.state_dict())
    apply_hyper_connections(model)


def test_what_is_whole_is_accepted(tmp_path):
    model = AutoModel.from_config(configurations("llama")[0])
    wrapped = nn.ModuleDict({"inner": model})  # of no transformers model
    apply_hyper_connections(model)
    assert has_hyper_connections(wrapped["inner"])
    base = AutoModel.from_config(configurations("llama")[0])
    del wrapped
    apply_hyper_connections(base).save_pretrained(tmp_path)
    assert has_hyper_connections(AutoModel.from_pretrained(tmp_path))


def test_a_part_of_a_model_that_is_gone():
    model = llava()
    model.cycle = [model]
    text = model.model.language_model
    del model
    assert has_hyper_connections(apply_hyper_connections(text))


def test_a_connected_layer_in_a_plain_model_is_not_saved(tmp_path):
    model = tiny_llama()
    model.model.layers[0] = connected().model.layers[0]
    with pytest.raises(ValueError, match=r"model\.layers\.0 has them"):
        model.save_pretrained(tmp_path)


def test_models_with_adapters_are_saved_as_before(tmp_path):
    base = tiny_llama()
    model = get_peft_model(base, adapter_config())
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()
    model.unload().save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), base.parameters()))


def test_a_model_that_failed_while_it_was_made_is_passed_over():
    """A notebook keeps what an exception held."""
    held = LlamaForCausalLM.__new__(LlamaForCausalLM)
    model = LlamaModel(configurations("llama")[0])
    assert has_hyper_connections(apply_hyper_connections(model))
    assert "_modules" not in vars(held)
