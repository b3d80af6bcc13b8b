"""apply, has, remove: each undoes or answers for the other, and a refusal changes nothing."""

import copy

import pytest
import torch
from support.tiny import configurations, make_model, token_ids
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

from kromhc_hf import (
    KromHCForCausalLM,
    apply_hyper_connections,
    has_hyper_connections,
    remove_hyper_connections,
)


def llama(**changes) -> LlamaForCausalLM:
    return make_model(configurations("llama")[0].__class__(**{**configurations("llama")[0].to_dict(), **changes}))


def snapshot(model: nn.Module) -> dict:
    """Everything that apply might leave behind."""
    return {
        "classes": {name: type(module) for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "parameters": {name: (id(p), p.clone()) for name, p in model.state_dict(keep_vars=True).items()},
        "config": model.config.to_dict(),
        "config object": id(model.config),
        "no split": set(model._no_split_modules),
        "fp32": set(model._keep_in_fp32_modules_strict),
        "not quantised": set(model._keep_in_fp32_modules),
    }


def assert_same(before: dict, after: dict, ignore: tuple[str, ...] = ()) -> None:
    for part in before.keys() - {"parameters", *ignore}:
        assert before[part] == after[part], part
    assert list(before["parameters"]) == list(after["parameters"])
    for name, (identity, value) in before["parameters"].items():
        assert after["parameters"][name][0] == identity
        assert torch.equal(after["parameters"][name][1], value)


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "phi3", "gpt2", "gpt_neox", "mixtral"])
def test_remove_restores_everything(family):
    config = configurations(family)[0]
    model = make_model(config)
    before, tokens = snapshot(model), token_ids(config)
    expected = model(tokens, output_hidden_states=True)
    assert not has_hyper_connections(model)
    assert apply_hyper_connections(model, num_streams=3) is model
    assert has_hyper_connections(model)
    assert set(before["parameters"]) < set(model.state_dict())
    model(tokens, output_hidden_states=True)
    assert remove_hyper_connections(model) is model
    assert not has_hyper_connections(model)
    # The configuration is an equal copy, since the caller may have gone on using the first one.
    assert_same(before, snapshot(model), ignore=("config object", "attributes"))
    result = model(tokens, output_hidden_states=True)
    assert torch.equal(result.logits, expected.logits)
    assert [h.shape for h in result.hidden_states] == [h.shape for h in expected.hidden_states]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_streams": 0}, r"num_streams must be at least 1; got 0\. Use"),
        ({"num_streams": -1}, r"num_streams must be at least 1; got -1\. Use"),
        ({"num_streams": 7}, r"no prime factor above 5 .* 7! permutation matrices; got 7\. Use num_streams=8"),
        ({"num_streams": "4"}, r"num_streams must be an int; got '4' of type str\. Use"),
        ({"num_streams": True}, r"num_streams must be an int; got True of type bool"),
        ({"variant": "krom"}, r"variant must be one of kromhc, .*; got 'krom'"),
        ({"init": "random"}, r"init must be one of identity, paper; got 'random'"),
        ({"readout": "max"}, r"readout must be one of mean, sum.*; got 'max'"),
        ({"readout": "sum"}, r"readout 'sum'\. Use readout='mean', or init='paper'"),
        ({"eps": -1.0}, r"^eps must not be negative; got -1\.0"),
        ({"eps": float("nan")}, "^eps must be finite; got nan"),
        ({"residual_logit": float("inf")}, "^residual_logit must be finite; got inf"),
        ({"dynamic": "yes"}, r"^dynamic must be of type bool; got 'yes'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_refused_apply_changes_nothing(options, message):
    model = llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        apply_hyper_connections(model, **options)
    assert_same(before, snapshot(model))


def test_a_layer_that_is_not_as_described_is_refused_whole():
    model = llama()
    del model.model.layers[2].input_layernorm
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layer 2 \(LlamaDecoderLayer\) must have a module 'input_layernorm'"):
        apply_hyper_connections(model)
    assert_same(before, snapshot(model))


def test_a_foreign_layer_class_is_refused():
    model = llama()
    model.model.layers[1].__class__ = type("MyLayer", (type(model.model.layers[1]),), {"__module__": "mine"})
    with pytest.raises(ValueError, match=r"layer 1 \(MyLayer\) must be a decoder layer of transformers; .* in mine"):
        apply_hyper_connections(model)


def test_what_is_applied_in_inference_mode_can_be_trained():
    model = llama()
    with torch.inference_mode():
        apply_hyper_connections(model)
    tokens = token_ids(model.config)
    model(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_an_instance_level_forward_is_refused():
    model = llama()
    model.model.layers[0].forward = model.model.layers[0].forward
    with pytest.raises(ValueError, match="layer 0 .* instance-level forward is in the way"):
        apply_hyper_connections(model)
    model = llama()
    # States that are recorded would be those of the streams.
    model.model.forward = model.model.forward
    with pytest.raises(ValueError, match="the model around the layers .* instance-level forward is in the way"):
        apply_hyper_connections(model)
    assert not has_hyper_connections(model)


def test_missing_and_repeated_layers_are_refused():
    model = llama()
    model.model.layers = model.model.layers[:2]
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"num_hidden_layers = 3 decoder layers.*; got 2\. Set config"):
        apply_hyper_connections(model)
    model.config.num_hidden_layers = 2
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(ValueError, match="must be a module of its own; got one that is used several times"):
        apply_hyper_connections(model)
    assert before["classes"]["model.layers.0"] is type(model.model.layers[0])
    assert not has_hyper_connections(model)


def test_a_part_cannot_be_left_behind():
    model = apply_hyper_connections(llama())
    with pytest.raises(
        ValueError, match="from the whole model; got the KromHCLlamaModel inside a KromHCLlamaForCausalLM"
    ):
        remove_hyper_connections(model.model)
    assert has_hyper_connections(model.model)
    model.model.layers[0] = llama().model.layers[0]
    with pytest.raises(ValueError, match=r"got layer 0 \(LlamaDecoderLayer\) without"):
        remove_hyper_connections(model)


def test_a_dispatched_layer_is_not_removed():
    model = apply_hyper_connections(llama())
    model.model.layers[2].forward = model.model.layers[2].forward
    with pytest.raises(ValueError, match="layer 2 .* instance-level forward is in the way"):
        remove_hyper_connections(model)
    assert has_hyper_connections(model)


def test_applying_twice_is_refused():
    model = apply_hyper_connections(llama())
    with pytest.raises(ValueError, match="already has hyper-connections with num_streams=4. Call remove_hyper"):
        apply_hyper_connections(model)


def test_removing_nothing_is_refused():
    with pytest.raises(ValueError, match="must have hyper-connections to remove; got LlamaForCausalLM"):
        remove_hyper_connections(llama())


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), None], ids=["module", "none"])
def test_other_objects_are_refused(thing):
    with pytest.raises(ValueError, match="model must be a transformers model; got"):
        apply_hyper_connections(thing)


def test_unknown_family_is_refused():
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    with pytest.raises(ValueError, match="'bert' is not supported: the norm follows the residual addition"):
        apply_hyper_connections(BertLMHeadModel(config))


def test_cross_attention_is_refused():
    config = configurations("gpt2")[0]
    config.add_cross_attention = True
    with pytest.raises(ValueError, match="without cross-attention; got add_cross_attention=True"):
        apply_hyper_connections(make_model(config))


def test_a_shared_configuration_is_left_alone():
    config = configurations("llama")[0]
    first, second = LlamaForCausalLM(config), LlamaForCausalLM(config)
    apply_hyper_connections(first)
    assert type(config) is LlamaConfig
    assert second.config is config
    assert not hasattr(config, "hc_num_streams")
    assert first.config is first.model.config is first.model.layers[0].self_attn.config
    first.set_attn_implementation("eager")
    assert first.model.layers[0].self_attn.config._attn_implementation == "eager"
    assert second.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("cls", [LlamaModel, LlamaForCausalLM, LlamaForSequenceClassification])
def test_every_task_class(cls):
    config = configurations("llama")[0]
    model = cls(config).eval()
    tokens = token_ids(config)
    before = model(tokens, output_hidden_states=True)
    apply_hyper_connections(model)
    after = model(tokens, output_hidden_states=True)
    assert torch.equal(after[0], before[0])
    assert all(torch.equal(a, b) for a, b in zip(after.hidden_states, before.hidden_states))
    assert isinstance(model, KromHCForCausalLM) == (cls is LlamaForCausalLM)
    as_tuple = model(tokens, output_hidden_states=True, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], after[0])


def test_one_stream_is_the_plain_model():
    model = llama()
    keys, tokens = list(model.state_dict()), token_ids(model.config)
    before = model(tokens).logits
    apply_hyper_connections(model, num_streams=1)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(tokens).logits, before)


def test_a_copy_is_independent():
    model = apply_hyper_connections(llama())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[0].attn_hc.bias.add_(1)
    tokens = token_ids(model.config)
    assert not torch.equal(model(tokens).logits, twin(tokens).logits)
    remove_hyper_connections(twin)
    assert has_hyper_connections(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_hyper_connections_stay_fp32(dtype):
    model = apply_hyper_connections(llama()).to(dtype)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "_hc." in name else dtype)


def test_half_model_applied_in_training_mode():
    model = apply_hyper_connections(llama().bfloat16().train())
    assert all(module.training for module in model.modules())
    assert model.model.layers[0].attn_hc.weight.dtype == torch.float32
