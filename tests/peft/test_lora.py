"""LoRA on a model with hyper-connections, and beside hyper-connections as an adapter."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from support.adapters import adapter_config, base_model, lora_config, perturb
from support.runs import make_trainer, retrofitted
from support.tiny import token_ids
from transformers import AutoModelForCausalLM

from kromhc_hf import KromHCForCausalLM, adapter_to_model, record_mappings


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
def test_all_linear_lora_leaves_hyper_connections_alone(model_type):
    native = get_peft_model(base_model(model_type), LoraConfig(target_modules="all-linear"))
    model = get_peft_model(retrofitted(model_type), LoraConfig(target_modules="all-linear"))
    assert model.targeted_module_names == native.targeted_module_names
    assert not any(".attn_hc." in n or ".block_hc." in n for n, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_modules_to_save_trains_and_saves_hyper_connections(tmp_path, model_type):
    base_folder, adapter_folder = tmp_path / "base", tmp_path / "adapter"
    retrofitted(model_type).save_pretrained(base_folder)
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        modules_to_save=["attn_hc", "ffn_hc"],
        init_lora_weights=False,
    )
    model = get_peft_model(base, config)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len([name for name in trainable if "_hc.modules_to_save" in name]) == 3 * 2 * 3
    assert all("lora_" in name or "_hc.modules_to_save" in name for name in trainable)
    trainer = make_trainer(tmp_path, model, max_steps=2)
    trainer.train()
    model.eval()
    ids = token_ids(base.config)
    logits = model(ids).logits
    with record_mappings(model) as records:
        model(ids)
    assert len(records) == 6
    model.save_pretrained(adapter_folder)
    with safe_open(adapter_folder / "adapter_model.safetensors", "pt") as file:
        own = [file.get_tensor(key) for key in file.keys() if "_hc." in key]  # noqa: SIM118
    assert len(own) == 3 * 2 * 3
    assert {tensor.dtype for tensor in own} == {torch.float32}
    loaded = AutoPeftModelForCausalLM.from_pretrained(adapter_folder)
    assert isinstance(loaded.get_base_model(), KromHCForCausalLM)
    assert torch.equal(loaded(ids).logits, logits)
    with pytest.raises(ValueError, match=r"modules_to_save=\['attn_hc', 'ffn_hc'\].* has none"):
        PeftModel.from_pretrained(base_model(model_type), adapter_folder)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*attn_hc"):
        PeftModel.from_pretrained(retrofitted(model_type, num_streams=2), adapter_folder)


def test_modules_to_save_of_a_parallel_block_is_its_one_hyper_connection():
    with pytest.raises(ValueError, match="GPTNeoXForCausalLM has block_hc"):
        get_peft_model(retrofitted("gpt_neox"), LoraConfig(modules_to_save=["attn_hc", "ffn_hc"]))
    model = get_peft_model(retrofitted("gpt_neox"), LoraConfig(modules_to_save=["block_hc"]))
    assert sum("block_hc.modules_to_save" in n for n, p in model.named_parameters() if p.requires_grad) == 3 * 3


def test_lora_on_top_of_an_adapter():
    base = base_model()
    ids = token_ids(base.config)
    expected = base(ids).logits
    model = get_peft_model(base, adapter_config(), adapter_name="streams")
    perturb(model)
    streams_alone = model(ids).logits
    stacked = get_peft_model(model, lora_config(), adapter_name="low_rank")
    both = stacked(ids).logits
    assert not torch.equal(both, streams_alone)
    # PEFT before 0.21 freezes the lower adapter, of whatever kind.
    control = get_peft_model(get_peft_model(base_model(), lora_config(), "lower"), lora_config(), "upper")
    kept = {parameter.requires_grad for name, parameter in control.named_parameters() if ".lower." in name}
    trainable = {name: parameter.requires_grad for name, parameter in stacked.named_parameters()}
    assert {value for name, value in trainable.items() if "hyper_connection_" in name} == kept
    assert {value for name, value in trainable.items() if "lora_" in name} == {True}
    with stacked.disable_adapter():
        assert torch.equal(stacked(ids).logits, expected)
    assert torch.equal(stacked(ids).logits, both)


def test_two_adapter_files_on_one_base(tmp_path):
    """LoRA first, hyper-connections on the same base: each has a file of its own, which loads by itself too."""
    base = base_model()
    ids = token_ids(base.config)
    expected = base(ids).logits
    low_rank = get_peft_model(base, lora_config(), adapter_name="low_rank")
    lora_alone = low_rank(ids).logits
    model = get_peft_model(base, adapter_config(), adapter_name="streams")
    assert torch.equal(model(ids).logits, lora_alone)
    perturb(model)
    both = model(ids).logits
    model.save_pretrained(tmp_path)
    keys = {name: load_file(tmp_path / name / "adapter_model.safetensors").keys() for name in ("low_rank", "streams")}
    assert all("_hc.hyper_connection_adapters." in key for key in keys["streams"])
    assert all(".lora_" in key for key in keys["low_rank"])

    other = base_model()
    PeftModel.from_pretrained(other, tmp_path / "low_rank", adapter_name="low_rank")
    loaded = PeftModel.from_pretrained(other, tmp_path / "streams", adapter_name="streams")
    assert torch.equal(loaded(ids).logits, both)
    with loaded.disable_adapter():
        assert torch.equal(loaded(ids).logits, expected)
    with_lora = loaded.unload()
    assert not torch.equal(with_lora(ids).logits, expected)
    with pytest.raises(ValueError, match="The base must have no other adapters; got layers of type Linear"):
        adapter_to_model(model, "streams")
    with pytest.raises(ValueError, match="must be of a KromHCPeftConfig; got LoraConfig"):
        adapter_to_model(model, "low_rank")
