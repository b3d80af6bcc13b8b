"""What docs/limits.md and docs/training.md warn of is so; whoever mends one of these takes its line out."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.connected import tiny_llama

from kromhc_hf import HyperConnection, apply_hyper_connections, has_hyper_connections


@pytest.fixture
def model():
    """Four streams in three layers, each with mappings far from those of a conversion."""
    torch.manual_seed(0)
    model = apply_hyper_connections(tiny_llama(), 4)
    for module in model.modules():
        if isinstance(module, HyperConnection):
            for parameter in module.parameters():
                parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def token_ids(rows, length):
    return torch.randint(50, (rows, length))


@pytest.mark.parametrize(("rows", "length", "silent"), [(1, 4, True), (1, 7, False), (2, 4, False)])
def test_what_a_hook_adds_needs_a_dimension_for_the_streams(model, rows, length, silent):
    added, ids = torch.randn(rows, length, 32), token_ids(rows, length)
    expected = model(ids).logits

    def found(what):
        handle = model.model.layers[0].register_forward_hook(lambda module, args, streams: streams + what)
        try:
            return model(ids).logits
        finally:
            handle.remove()

    right = found(added.unsqueeze(-2))
    assert right.shape == expected.shape
    assert not torch.allclose(right, expected)
    if silent:
        assert not torch.allclose(found(added), right)
    else:
        with pytest.raises(RuntimeError, match="must match the size"):
            found(added)


def test_hidden_states_between_the_layers_are_copies(model):
    ids, streams = token_ids(2, 8), []
    model.model.layers[0].register_forward_hook(lambda module, args, output: streams.append(output))
    out = model(ids, labels=ids, output_hidden_states=True)
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(out.loss, out.hidden_states[1], retain_graph=True)
    (gradient,) = torch.autograd.grad(out.loss, streams)
    assert gradient.shape == (2, 8, 4, 32)
    assert gradient.abs().max() > 0


def test_streams_that_a_hook_writes_into_unseen_are_rebuilt_without_it(model):
    def gradients(recompute, hook):
        model.config.hc_stream_recompute = recompute
        model.zero_grad()
        handle = model.model.layers[0].register_forward_hook(hook)
        model(ids, labels=ids).loss.backward()
        handle.remove()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    def unseen(module, args, streams):
        streams.data.mul_(0.5)

    ids = token_ids(2, 40)
    layers = len(model.model.layers)
    assert not torch.allclose(gradients(layers, unseen), gradients("none", unseen))
    right = [gradients(recompute, lambda module, args, streams: 0.5 * streams) for recompute in (layers, "none")]
    assert torch.equal(*right)


def test_wrappers_are_not_looked_into(model):
    compiled = torch.compile(model)
    assert not has_hyper_connections(compiled)
    assert has_hyper_connections(compiled._orig_mod)
    wrapped = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert not has_hyper_connections(wrapped)
    assert has_hyper_connections(wrapped.get_base_model())
