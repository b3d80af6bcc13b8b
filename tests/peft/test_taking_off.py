"""Adapters of hyper-connections are taken off: what was trained beside them goes too, and what is beside them stays."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.adapters import adapter_config, base_model, lora_config, perturb
from support.tiny import token_ids
from transformers import AutoModelForCausalLM

from kromhc_hf import KromHCForCausalLM, adapter_to_model


def values(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(map(torch.equal, one.values(), other.values()))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("modules", [["norm"], ["lm_head"], ["embed_tokens", "lm_head"], ["q_proj", "norm"]], ids=str)
def test_trained_modules_to_save_go_with_the_adapter(tmp_path, modules, tied):
    base = base_model(tie_word_embeddings=tied)
    before, ids = values(base), token_ids(base.config)
    expected = base(ids).logits
    model = get_peft_model(base, adapter_config(modules_to_save=modules))
    perturb(model)
    assert not torch.equal(model(ids).logits, expected)
    unloaded = model.unload()
    assert same(values(unloaded), before)
    unloaded.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(loaded(ids).logits, expected)


def test_a_module_that_two_methods_train_is_left_to_the_other():
    base = base_model()
    ids = token_ids(base.config)
    before = values(base)
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["norm"])
    low_rank = get_peft_model(base, lora, adapter_name="low_rank")
    perturb(low_rank)
    expected = low_rank(ids).logits
    model = get_peft_model(base, adapter_config(modules_to_save=["norm"]), adapter_name="streams")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".streams." in name:
                parameter.add_(0.1)
    model.set_adapter("streams")
    assert not torch.equal(model(ids).logits, expected)
    assert model.unload() is base
    assert torch.equal(low_rank(ids).logits, expected)
    assert list(low_rank.peft_config) == list(base.peft_config) == ["low_rank"]
    assert values(low_rank.merge_and_unload()).keys() == before.keys()


def stacked(nested: bool):
    """LoRA, and hyper-connections around its PeftModel or on the same base; both trained."""
    base = base_model()
    low_rank = get_peft_model(base, lora_config(), adapter_name="low_rank")
    model = get_peft_model(low_rank if nested else base, adapter_config(), adapter_name="streams")
    perturb(model)
    return low_rank.eval(), model.eval()


@pytest.mark.parametrize("nested", [False, True], ids=["same base", "nested"])
def test_the_advised_way_from_two_adapters_to_a_full_model(tmp_path, nested):
    low_rank, model = stacked(nested)
    before, ids = values(model), token_ids(model.config)
    both = model(ids).logits
    with pytest.raises(ValueError, match=r"Merge them first, with merge_and_unload\(\) of their own PeftModel"):
        adapter_to_model(model)
    assert same(values(model), before)
    low_rank.merge_and_unload()
    merged = model(ids).logits
    torch.testing.assert_close(merged, both)
    full = adapter_to_model(model)
    assert isinstance(full, KromHCForCausalLM)
    assert torch.equal(full(ids).logits, merged)
    assert not hasattr(full, "peft_config")
    full.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, merged)


@pytest.mark.parametrize("nested", [False, True], ids=["same base", "nested"])
def test_the_other_adapter_is_whole_after_unloading(tmp_path, nested):
    low_rank, model = stacked(nested)
    ids = token_ids(model.config)
    with_streams = model(ids).logits
    under = model.unload()
    assert under is (low_rank if nested else low_rank.get_base_model())
    assert list(low_rank.peft_config) == ["low_rank"]
    alone = low_rank(ids).logits
    assert not torch.equal(alone, with_streams)
    low_rank.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["low_rank"]
    merged = low_rank.merge_and_unload()
    assert type(merged) is type(base_model())
    torch.testing.assert_close(merged(ids).logits, alone)


def test_modules_to_save_of_lora_are_in_use_again_when_it_is_activated():
    """PEFT switches those of the first method off when a second one is put on, whatever the two are."""
    base = base_model()
    ids = token_ids(base.config)
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["norm"])
    low_rank = get_peft_model(base, lora, adapter_name="low_rank")
    perturb(low_rank)
    expected = low_rank(ids).logits
    model = get_peft_model(base, adapter_config(), adapter_name="streams")
    low_rank.set_adapter("low_rank")
    assert torch.equal(model(ids).logits, expected)
    low_rank.merge_and_unload()
    torch.testing.assert_close(adapter_to_model(model)(ids).logits, expected)


def test_unloading_twice_gives_the_same_base():
    model = get_peft_model(base_model(), adapter_config())
    assert model.unload() is model.unload()
    assert list(model.peft_config) == ["default"]


def test_a_refusal_leaves_the_adapter_where_it_is():
    for spoil in ("modules", "layers", "other model"):
        base = base_model()
        low_rank = get_peft_model(base, lora_config(), adapter_name="low_rank") if spoil == "other model" else None
        modules = ["norm"] if spoil == "modules" else None
        model = get_peft_model(base, adapter_config(modules_to_save=modules), adapter_name="streams")
        perturb(model)
        if spoil == "layers":
            base.config.num_hidden_layers = 2
            del base.model.layers[2]
        before, given = values(model), low_rank or model
        message = {"modules": "begin with a full model", "layers": "made for", "other model": "Give that one"}[spoil]
        with pytest.raises(ValueError, match=message):
            adapter_to_model(given, "streams")
        assert same(values(model), before)


def test_options_are_those_that_the_adapter_was_made_with():
    model = get_peft_model(base_model(), adapter_config(num_streams=2))
    perturb(model)
    ids = token_ids(model.config)
    expected = model(ids).logits
    model.peft_config["default"].num_streams = 4
    full = adapter_to_model(model)
    assert full.config.hc_num_streams == 2
    assert torch.equal(full(ids).logits, expected)
