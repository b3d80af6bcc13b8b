"""Parameter groups, a frozen backbone, and the Trainer: resume, accumulation and its defaults."""

import pytest
import torch
from support.runs import losses, make_trainer, retrofitted
from support.tiny import configurations, make_model, token_ids
from transformers import AutoModelForCausalLM, Trainer

from kromhc_hf import (
    HyperConnectionTrainerMixin,
    KromHCConfig,
    KromHCForCausalLM,
    apply_hyper_connections,
    freeze_backbone,
    hyper_connection_state_dict,
    load_hyper_connection_state_dict,
    optimizer_param_groups,
    shard_hyper_connections,
)
from kromhc_hf.training import hyper_connection_parameters


class KromHCTrainer(HyperConnectionTrainerMixin, Trainer):
    pass


def names(model, parameters) -> set[str]:
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return {by_id[id(parameter)] for parameter in parameters}


def is_hyper_connection(name: str) -> bool:
    return any(f".{part}." in name for part in ("attn_hc", "ffn_hc", "block_hc"))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
def test_groups_hold_every_parameter_once(model_type):
    model = retrofitted(model_type)
    groups = optimizer_param_groups(model, lr=1e-4, weight_decay=0.1)
    assert [group["name"] for group in groups] == ["backbone", "backbone_without_decay", "hyper_connections"]
    assert [group["lr"] for group in groups] == [1e-4, 1e-4, pytest.approx(3e-3)]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert names(model, groups[2]["params"]) == {n for n, _ in model.named_parameters() if is_hyper_connection(n)}
    assert {parameter.dim() for parameter in groups[0]["params"]} == {2}
    assert {parameter.dim() for parameter in groups[1]["params"]} == {1}
    torch.optim.AdamW(groups).step()


def partitioned(model):
    """As DeepSpeed's zero.Init leaves parameters: empty, with the shape of the whole in an attribute."""
    for parameter in model.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, parameter.new_empty(0)
    return model


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_groups_of_a_partitioned_model_are_those_of_the_whole(model_type):
    whole = retrofitted(model_type)
    expected = [names(whole, group["params"]) for group in optimizer_param_groups(whole, lr=1e-4)]
    model = partitioned(retrofitted(model_type))
    assert [names(model, group["params"]) for group in optimizer_param_groups(model, lr=1e-4)] == expected
    assert len(expected) == 3


def test_what_cannot_be_done_with_a_partitioned_model_is_refused():
    tensors, model = hyper_connection_state_dict(retrofitted()), partitioned(retrofitted())
    with pytest.raises(ValueError, match="must not be sharded yet"):
        load_hyper_connection_state_dict(model, tensors, "a test")
    with pytest.raises(ValueError, match="must not be partitioned by DeepSpeed ZeRO-3"):
        shard_hyper_connections(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_partitions_in_16_bits_are_refused_and_left_alone(model_type, dtype):
    model = partitioned(make_model(configurations(model_type)[0], dtype))
    kind, keys = type(model), list(model.state_dict())
    with pytest.raises(ValueError, match=rf"ZeRO-3 keeps all parameters in one dtype.*got {dtype}.*torch_autocast"):
        apply_hyper_connections(model)
    assert (type(model), list(model.state_dict())) == (kind, keys)


def test_groups_of_given_rates_and_wrapped_models():
    model = retrofitted()
    plain = optimizer_param_groups(model, lr=1e-4, hyper_connection_lr=5e-3)
    wrapped = optimizer_param_groups(torch.compile(model), lr=1e-4, hyper_connection_lr=5e-3)
    assert [group["lr"] for group in plain] == [1e-4, 1e-4, 5e-3]
    for group, other in zip(plain, wrapped, strict=True):
        assert all(a is b for a, b in zip(group["params"], other["params"], strict=True))


def test_frozen_backbone_trains_hyper_connections_alone():
    model = retrofitted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert freeze_backbone(model) is model
    groups = optimizer_param_groups(model, lr=1e-4)
    assert [group["name"] for group in groups] == ["hyper_connections"]
    optimizer = torch.optim.AdamW(groups)
    ids = token_ids(model.config)
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if is_hyper_connection(name)}


@pytest.mark.parametrize(
    "function", [freeze_backbone, hyper_connection_state_dict, lambda m: optimizer_param_groups(m, 1e-4)]
)
def test_models_without_hyper_connections_are_refused(function):
    with pytest.raises(ValueError, match=r"must have hyper-connections with parameters; got LlamaForCausalLM .*apply"):
        function(make_model(configurations("llama")[0]))


def test_a_frozen_model_has_no_groups():
    with pytest.raises(ValueError, match="must have parameters to train; all are frozen"):
        optimizer_param_groups(retrofitted().requires_grad_(False), lr=1e-4)


def test_state_dict_and_base_make_the_model_again():
    config = KromHCConfig(backbone_config=configurations("llama")[0])
    model, other = make_model(config, seed=1), make_model(config, seed=1)
    with torch.no_grad():
        for parameter in optimizer_param_groups(model, lr=1.0)[-1]["params"]:
            parameter.add_(0.3)
    tensors = hyper_connection_state_dict(torch.compile(model))
    assert set(tensors) == {name for name in model.state_dict() if is_hyper_connection(name)}
    assert not any(tensor.requires_grad for tensor in tensors.values())
    ids = token_ids(config)
    assert not torch.equal(model(ids).logits, other(ids).logits)
    incompatible = other.load_state_dict(tensors, strict=False)
    assert incompatible.unexpected_keys == []
    assert torch.equal(model(ids).logits, other(ids).logits)


def test_trainer_mixin_makes_a_group_of_its_own(tmp_path):
    trainer = make_trainer(tmp_path, retrofitted(), kind=KromHCTrainer, learning_rate=1e-4, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    own = optimizer.param_groups[-1]
    assert (own["lr"], own["weight_decay"]) == (pytest.approx(3e-3), 0.0)
    wanted = {name for name, _ in trainer.model.named_parameters() if is_hyper_connection(name)}
    assert names(trainer.model, own["params"]) == wanted
    native = make_trainer(tmp_path, retrofitted(), learning_rate=1e-4, weight_decay=0.1).create_optimizer()
    for group, other in zip(optimizer.param_groups, native.param_groups, strict=False):
        assert (group["lr"], group["weight_decay"]) == (other["lr"], other["weight_decay"])
        assert 0 < len(group["params"]) < len(other["params"])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(trainer.model.parameters()))


def test_trainer_mixin_schedules_both_rates_and_takes_another(tmp_path):
    trainer = make_trainer(tmp_path, retrofitted(), kind=KromHCTrainer, learning_rate=1e-4, max_steps=4)
    trainer.hyper_connection_lr = 5e-3
    trainer.train()
    assert trainer.optimizer.param_groups[-1]["initial_lr"] == 5e-3
    # The linear schedule has reached its end for both.
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.0}
    # What is logged is still the learning rate of the backbone.
    assert trainer.state.log_history[0]["learning_rate"] == 1e-4


def test_trainer_mixin_leaves_a_given_optimizer_alone(tmp_path):
    model = retrofitted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = make_trainer(tmp_path, model, kind=KromHCTrainer)
    trainer.optimizer = optimizer
    assert trainer.create_optimizer() is optimizer
    assert len(optimizer.param_groups) == 1


def test_trainer_defaults_never_decay_the_static_mappings(tmp_path):
    """A Trainer without the mixin, with weight decay and no gradient: biases stay, so the model's function stays."""
    model = retrofitted().train()
    trainer = make_trainer(tmp_path, model, weight_decay=0.5)
    # The Trainer lists the names of parameters that a module does not have, too.
    there = {name for name, _ in model.named_parameters() if is_hyper_connection(name)}
    decayed = there & set(trainer.get_decay_parameter_names(model))
    assert {name.rsplit(".", 1)[1] for name in decayed} == {"weight", "alpha"}
    ids = token_ids(model.config)
    before = model.eval()(ids).logits
    backbone = {name: p.clone() for name, p in model.named_parameters() if not is_hyper_connection(name)}
    optimizer = trainer.create_optimizer()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in backbone:
                parameter.copy_(backbone[name])
    assert model.model.layers[0].attn_hc.alpha[0] < 0.01
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("kind", [KromHCTrainer, Trainer])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_resume_continues_with_exactly_the_same_losses(tmp_path, model_type, kind):
    # GPT-2 has dropout, so the random state matters too.
    whole = make_trainer(tmp_path / "whole", retrofitted(model_type), kind=kind)
    whole.train()
    halves = {"save_strategy": "steps", "save_steps": 3}
    first = make_trainer(tmp_path / "halves", retrofitted(model_type), kind=kind, **halves)
    first.train()
    checkpoint = tmp_path / "halves" / "checkpoint-3"
    torch.manual_seed(99)
    second = make_trainer(tmp_path / "halves", retrofitted(model_type, residual_logit=2.0), kind=kind, **halves)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert len(losses(whole)) == 6
    assert losses(second) == losses(whole)
    assert len({round(loss, 6) for loss in losses(whole)}) == 6
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], tensor), name


def test_a_trained_checkpoint_loads_without_the_package_entry_points(tmp_path):
    trainer = make_trainer(tmp_path, retrofitted(), kind=KromHCTrainer)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert isinstance(loaded, KromHCForCausalLM)
    ids = token_ids(loaded.config)
    assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)


def gradients(model, batches, accumulate: bool):
    """Gradients of the mean loss over all tokens, in one batch or accumulated over single sequences."""
    model.zero_grad()
    for batch in batches.split(1) if accumulate else [batches]:
        # What the Trainer passes, so that the parts add up to the mean over all tokens.
        model(batch, labels=batch, num_items_in_batch=batches[:, 1:].numel()).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
def test_gradient_accumulation_is_exact(model_type):
    # In float64, where nothing but the order of summation differs.
    model = retrofitted(model_type).double()
    for parameter in optimizer_param_groups(model, lr=1.0)[-1]["params"]:
        parameter.data += 0.1 * torch.randn_like(parameter)
    batches = token_ids(model.config, batch=4)
    together, accumulated = gradients(model, batches, False), gradients(model, batches, True)
    for name, gradient in together.items():
        # Sums of 4 * 12 tokens in another order: 48 roundings relative to the largest entry, and as many downstream.
        scale = gradient.abs().max().clamp_min(1e-3)
        assert ((accumulated[name] - gradient).abs().max() / scale).item() < 100 * torch.finfo(torch.float64).eps, name


def test_trainer_accumulates_to_the_losses_of_the_large_batch(tmp_path):
    options = {"max_steps": 3, "dataloader_drop_last": True, "optim": "sgd", "learning_rate": 0.1}
    large = make_trainer(tmp_path / "a", retrofitted(), per_device_train_batch_size=4, **options)
    large.train()
    small = make_trainer(
        tmp_path / "b", retrofitted(), per_device_train_batch_size=1, gradient_accumulation_steps=4, **options
    )
    small.train()
    # fp32 sums in another order, three plain gradient steps apart: a few eps of a loss near 4.6.
    assert losses(small) == pytest.approx(losses(large), abs=5e-6)


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel], ids=["compiled", "data-parallel"])
def test_state_of_the_hyper_connections_goes_into_a_wrapped_model(wrap):
    trained, other = retrofitted(), retrofitted()
    for parameter in hyper_connection_parameters(trained):
        parameter.data.add_(torch.randn_like(parameter))
    tensors = hyper_connection_state_dict(trained)
    load_hyper_connection_state_dict(wrap(other), tensors, "a test")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in hyper_connection_state_dict(other).items())
    del tensors["model.layers.0.attn_hc.bias"]
    with pytest.raises(
        ValueError, match=r"a test must hold 'model.layers.0.attn_hc.bias' with shape \[\d+\].*; got None"
    ):
        load_hyper_connection_state_dict(other, tensors, "a test")
