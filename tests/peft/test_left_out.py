"""The warning that an adapter is saved without the hyper-connections that its base has in memory."""

import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, get_peft_model
from support.adapters import adapter_config, base_model, perturb_hyper_connections
from support.hub_client import push_base
from support.runs import retrofitted
from support.tiny import token_ids
from transformers import AutoModelForCausalLM

from kromhc_hf import apply_hyper_connections, convert_checkpoint


LEFT_OUT = "hyper-connections of its model, or name a base that has them"


def lora(**fields) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **fields)


def saving_warns(model, folder) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(folder)
    return [str(warning.message) for warning in caught if LEFT_OUT in str(warning.message)]


@pytest.fixture
def plain(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("config", [lora(), IA3Config(task_type="CAUSAL_LM")], ids=["lora", "ia3"])
def test_streams_in_memory_that_no_file_has_are_told(tmp_path, plain, config):
    full = apply_hyper_connections(AutoModelForCausalLM.from_pretrained(plain))
    perturb_hyper_connections(full)
    model = get_peft_model(full, config)
    (message,) = saving_warns(model, tmp_path / "adapter")
    assert f"'default' is saved without attn_hc, ffn_hc of KromHCLlamaForCausalLM, and its base {plain} has" in message
    ids = token_ids(full.config)
    expected = model.eval()(ids).logits
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert not torch.allclose(loaded(ids).logits, expected)
    # The ways out that the message names.
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(ids).logits, expected)


def test_streams_that_came_after_the_adapter_are_told(tmp_path, plain):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(plain), lora())
    assert not saving_warns(model, tmp_path / "before")
    apply_hyper_connections(model.get_base_model())
    assert saving_warns(model, tmp_path / "after")


def test_ends_of_the_streams_that_are_not_among_the_modules_to_save_are_told(tmp_path, plain):
    modules = ["attn_hc", "ffn_hc"]
    full = apply_hyper_connections(AutoModelForCausalLM.from_pretrained(plain), readout="softmax")
    (message,) = saving_warns(get_peft_model(full, lora(modules_to_save=modules)), tmp_path / "adapter")
    assert "is saved without readout_hc of" in message


def test_the_right_uses_are_silent(tmp_path, plain):
    full = apply_hyper_connections(AutoModelForCausalLM.from_pretrained(plain))
    assert not saving_warns(get_peft_model(full, lora(modules_to_save=["attn_hc", "ffn_hc"])), tmp_path / "both")
    convert_checkpoint(plain, tmp_path / "converted")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    assert not saving_warns(get_peft_model(converted, lora()), tmp_path / "on_converted")
    streams = get_peft_model(AutoModelForCausalLM.from_pretrained(plain), adapter_config())
    assert not saving_warns(streams, tmp_path / "streams")
    # It names no base, so nothing will load it by itself.
    assert not saving_warns(get_peft_model(retrofitted(), lora()), tmp_path / "no_base")
    one_stream = apply_hyper_connections(AutoModelForCausalLM.from_pretrained(plain), num_streams=1)
    assert not saving_warns(get_peft_model(one_stream, lora()), tmp_path / "one_stream")


@pytest.mark.parametrize("converted", [False, True], ids=["plain", "converted"])
def test_a_base_on_the_hub_is_known_from_the_cache(hub, tmp_path, plain, converted):
    if converted:
        convert_checkpoint(plain, tmp_path / "converted")
    push_base(tmp_path / "converted" if converted else plain)
    model = AutoModelForCausalLM.from_pretrained("ada/base")
    if not converted:
        apply_hyper_connections(model)
    assert bool(saving_warns(get_peft_model(model, lora()), tmp_path / "adapter")) is not converted
