"""Adapters of hyper-connections on models of several modalities, and the way to full models and back."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.adapters import adapter_config
from support.composite import composite_inputs, make_composite
from support.tiny import separate_streams
from transformers import AutoModelForImageTextToText

from kromhc_hf import (
    KromHCForImageTextToText,
    adapter_to_model,
    apply_hyper_connections,
    composite_model_types,
    model_to_adapter,
)
from kromhc_hf.peft.conversion import adapter_to_checkpoint, checkpoint_to_adapter


# mistral_large4 is stored under other names than it is computed with.
TYPES = [name for name in ("llava", "qwen3_vl", "mistral_large4", "blip-2") if name in composite_model_types()]


@torch.no_grad()
def logits(model, model_type):
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return model.eval()(**composite_inputs(model_type, base), use_cache=False).logits


@pytest.fixture(params=TYPES)
def adapted(request, tmp_path):
    """A model type, and in the folder `tmp_path` its base, an adapter, and what it computes with it."""
    base = make_composite(request.param)
    base.save_pretrained(tmp_path / "base")
    native = logits(base, request.param)
    model = get_peft_model(base, adapter_config(num_streams=4))
    assert torch.equal(logits(model, request.param), native)
    separate_streams(model)
    expected = logits(model, request.param)
    model.save_pretrained(tmp_path / "adapter")
    return request.param, native, expected


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder)


def test_loaded_switched_off_unloaded_and_made_full(adapted, tmp_path):
    model_type, native, expected = adapted
    model = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")
    assert model.peft_config["default"].base_model_type == model_type
    assert torch.equal(logits(model, model_type), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, model_type), native)
    full = adapter_to_model(model)
    assert isinstance(full, KromHCForImageTextToText)
    assert torch.equal(logits(full, model_type), expected)
    full.save_pretrained(tmp_path / "full")
    assert torch.equal(logits(load(tmp_path / "full"), model_type), expected)
    model_to_adapter(full, tmp_path / "again", tmp_path / "base")
    again = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "again")
    assert torch.equal(logits(again, model_type), expected)
    base = again.unload()
    assert [type(part) for part in base.modules()] == [type(part) for part in load(tmp_path / "base").modules()]
    assert torch.equal(logits(base, model_type), native)


def test_from_folder_to_folder(adapted, tmp_path):
    model_type, _, expected = adapted
    adapter_to_checkpoint(tmp_path / "adapter", tmp_path / "full", tmp_path / "base")
    assert torch.equal(logits(load(tmp_path / "full"), model_type), expected)
    checkpoint_to_adapter(tmp_path / "full", tmp_path / "again", tmp_path / "base")
    again = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "again")
    assert torch.equal(logits(again, model_type), expected)


def test_an_adapter_of_another_type_is_refused(tmp_path):
    model = get_peft_model(make_composite("llava"), adapter_config(num_streams=4))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="must be loaded on the base model that it was made for"):
        PeftModel.from_pretrained(make_composite("vipllava"), tmp_path / "adapter")


def test_lora_on_a_model_with_streams(tmp_path):
    model = apply_hyper_connections(make_composite("llava"))
    separate_streams(model)
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(model, config)
    expected = logits(adapted, "llava")
    adapted.save_pretrained(tmp_path / "lora")
    again = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "lora")
    assert torch.equal(logits(again, "llava"), expected)
