"""Hyper-connections as an adapter on a plain base."""

import copy
import pickle

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file
from support.adapters import FAMILIES, adapter_config, base_model, perturb
from support.runs import CHECKPOINTING, losses, make_trainer, retrofitted
from support.tiny import token_ids
from transformers import AutoModelForCausalLM

from kromhc_hf import apply_hyper_connections, has_hyper_connections


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_new_adapter_keeps_the_function_and_disabling_gives_the_base(model_type):
    base = base_model(model_type)
    native_class = type(base)
    ids = token_ids(base.config)
    options = {"output_hidden_states": True, "use_cache": False}
    expected = base(ids, **options)
    model = get_peft_model(base, adapter_config())
    new = model(ids, **options)
    assert torch.equal(new.logits, expected.logits)
    for ours, native in zip(new.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(ours, native)
    perturb(model)
    trained = model(ids, **options)
    assert not torch.equal(trained.logits, expected.logits)
    assert [h.shape for h in trained.hidden_states] == [h.shape for h in expected.hidden_states]
    assert torch.equal(model(ids, output_hidden_states=True, return_dict=False)[0], trained.logits)
    with model.disable_adapter():
        base_again = model(ids, **options)
        assert torch.equal(base_again.logits, expected.logits)
        assert all(map(torch.equal, base_again.hidden_states, expected.hidden_states))
    assert torch.equal(model(ids).logits, trained.logits)
    unloaded = model.unload()
    assert type(unloaded) is native_class
    assert not has_hyper_connections(unloaded)
    assert torch.equal(unloaded(ids).logits, expected.logits)
    assert set(unloaded.state_dict()) == set(base_model(model_type).state_dict())


def test_adapter_trains_alone_and_in_float32():
    base = base_model().to(torch.bfloat16).train()
    model = get_peft_model(base, adapter_config())
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 3 * 2 * 3
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    ids = token_ids(base.config)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in trainable.values())
    assert all(p.grad is None for p in base.parameters() if not p.requires_grad)


@pytest.mark.parametrize("options", [{}, {CHECKPOINTING: True}], ids=["plain", "checkpointing"])
def test_trainer_trains_the_adapter_and_resumes_exactly(tmp_path, options):
    def trainer(folder, **more):
        return make_trainer(folder, get_peft_model(base_model(), adapter_config()), **options, **more)

    whole = trainer(tmp_path / "whole")
    whole.train()
    first = trainer(tmp_path / "halves", save_strategy="steps", save_steps=3)
    first.train()
    second = trainer(tmp_path / "halves", save_strategy="steps", save_steps=3)
    second.train(resume_from_checkpoint=str(tmp_path / "halves" / "checkpoint-3"))
    assert losses(second) == losses(whole)
    assert len(set(losses(whole))) == 6


def test_only_hyper_connections_are_saved_and_auto_class_loads_them(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, adapter_config())
    perturb(model)
    ids = token_ids(base.config)
    logits = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 3 * 2 * 3
    assert all("_hc." in key for key in tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded(ids).logits, logits)
    assert not any(p.requires_grad for p in loaded.parameters())
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", low_cpu_mem_usage=True, is_trainable=True)
    assert torch.equal(again(ids).logits, logits)
    assert sum(p.requires_grad for p in again.parameters()) == 3 * 2 * 3
    ids_out = loaded.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(ids_out, model.generate(input_ids=ids, max_new_tokens=4, do_sample=False))


def test_several_adapters_are_switched_and_deleted():
    base = base_model()
    ids = token_ids(base.config)
    expected = base(ids).logits
    model = get_peft_model(base, adapter_config(num_streams=2))
    perturb(model)
    first = model(ids).logits
    model.add_adapter("second", adapter_config(num_streams=4, dynamic=False))
    assert torch.equal(model(ids).logits, first)
    model.set_adapter("second")
    assert torch.equal(model(ids).logits, expected)
    assert {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad} == {"bias"}
    perturb(model)
    second = model(ids).logits
    assert not torch.equal(second, first)
    model.set_adapter("default")
    assert torch.equal(model(ids).logits, first)
    with pytest.raises(ValueError, match=r"One adapter of hyper-connections can be active.*\['default', 'second'\]"):
        model.base_model.set_adapter(["default", "second"])
    model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert torch.equal(model(ids).logits, second)


def test_adapters_with_and_without_learned_ends_are_switched():
    base = base_model()
    ids = token_ids(base.config)
    model = get_peft_model(base, adapter_config(num_streams=2), adapter_name="plain")
    model.add_adapter("ends", adapter_config(readout="attention", stream_embedding=True, init="identity"))
    outputs = {}
    for name in ("plain", "ends"):
        model.set_adapter(name)
        perturb(model)
        outputs[name] = model.eval()(ids).logits
    assert not torch.equal(outputs["plain"], outputs["ends"])
    for name in ("plain", "ends", "plain"):
        model.set_adapter(name)
        assert torch.equal(model(ids).logits, outputs[name])
    model.delete_adapter("ends")
    assert torch.equal(model(ids).logits, outputs["plain"])
    assert not [name for name, _ in model.named_parameters() if "expand_hc" in name or "readout_hc" in name]
    assert type(model.unload()) is type(base_model())


def test_deleting_the_active_adapter_leaves_the_ends_of_the_one_that_follows():
    base = base_model()
    ids = token_ids(base.config)
    model = get_peft_model(base, adapter_config(readout="softmax", stream_embedding=True), adapter_name="a")
    model.add_adapter("b", adapter_config())
    model.add_adapter("c", adapter_config(num_streams=2, readout="softmax", stream_embedding=True))
    outputs = {}
    for name in ("c", "b", "a"):
        model.set_adapter(name)
        perturb(model)
        outputs[name] = model.eval()(ids).logits
    model.delete_adapter("a")
    (active,) = model.active_adapters
    assert torch.equal(model(ids).logits, outputs[active])
    model.delete_adapter(active)
    (last,) = model.active_adapters
    assert torch.equal(model(ids).logits, outputs[last])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("options", [{}, {"readout": "softmax", "stream_embedding": True}], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_an_adapted_model_can_be_copied(copied, options, model_type):
    model = get_peft_model(base_model(model_type), adapter_config(**options))
    perturb(model)
    ids = token_ids(model.config)
    expected = model.eval()(ids).logits
    twin = copied(model)
    assert torch.equal(twin(ids).logits, expected)
    perturb(twin)
    assert not torch.equal(twin(ids).logits, expected)
    assert torch.equal(model(ids).logits, expected)
    with twin.disable_adapter():
        assert torch.equal(twin(ids).logits, base_model(model_type)(ids).logits)
    assert type(twin.unload()) is type(base_model(model_type))


def test_merging_is_refused_with_the_reason():
    model = get_peft_model(base_model(), adapter_config())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="cannot be merged into the base model: they depend on the token"):
            merge()
    ids = token_ids(model.config)
    assert torch.equal(model(ids).logits, base_model()(ids).logits)


@pytest.mark.parametrize("options", [{"num_streams": 0}, {"num_streams": 7}, {"variant": "none"}, {"readout": "sum"}])
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match=r"num_streams|variant|readout"):
        adapter_config(**options)


def test_a_wrong_base_is_refused(tmp_path):
    model = get_peft_model(base_model(), adapter_config())
    model.save_pretrained(tmp_path)
    for wrong in (
        base_model("mistral"),
        base_model(num_hidden_layers=2),
        base_model(hidden_size=64),
    ):
        before = type(wrong.model.layers[0])
        with pytest.raises(ValueError, match="must be loaded on the base model that it was made for"):
            PeftModel.from_pretrained(wrong, tmp_path)
        assert type(wrong.model.layers[0]) is before
    with pytest.raises(ValueError, match="must be a plain model; KromHCLlamaForCausalLM has hyper-connections"):
        PeftModel.from_pretrained(retrofitted(), tmp_path)


def test_an_unsupported_family_is_refused():
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertLMHeadModel(BertConfig(**sizes, intermediate_size=16, is_decoder=True))
    with pytest.raises(ValueError, match="'bert' is not supported: the norm follows"):
        get_peft_model(bert, adapter_config())


def test_hyper_connections_cannot_be_applied_below_an_adapter():
    base = base_model()
    get_peft_model(base, adapter_config())
    with pytest.raises(ValueError, match="must not have an attribute 'attn_hc' yet"):
        apply_hyper_connections(base)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_mixed_batches_are_refused(call):
    model = get_peft_model(base_model("gpt2"), adapter_config()).eval()
    model.add_adapter("other", adapter_config(num_streams=2))
    ids = token_ids(model.config)
    for name in ("adapter_names", "alora_offsets"):
        with pytest.raises(ValueError, match=f"{name} must not be given .*one set of streams for the whole batch"):
            getattr(model, call)(input_ids=ids, **{name: ["default", "__base__"]})
    assert model(input_ids=ids, adapter_names=None).logits.shape[:2] == ids.shape
