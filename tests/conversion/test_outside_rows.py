"""Rows that do not fit the layers of a model, or say something else than their source, and what layers return."""

import copy
from dataclasses import replace

import pytest
import torch
from support.outside import AMBER, BASALT, CINDER, make_outside

from kromhc_hf import apply_hyper_connections, convert_checkpoint, has_hyper_connections, register_family
from kromhc_hf.rows import LayerSpec, Step, Sublayer, block, sequential


TOKENS = torch.tensor([[1, 5, 9, 3, 7, 2]])


pytestmark = pytest.mark.usefixtures("nothing_registered")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            sequential(Sublayer("attn", "first_norm"), Sublayer("feed_forward", "second_norm")),
            "module 'attn'; got None",
        ),
        (sequential(Sublayer("attention", "first_norm"), Sublayer("feed_forward")), "weights .* got 'second_norm'"),
        (block(Sublayer("attention", "first_norm", scale="factor")), "factor 'factor'; got None"),
        (sequential(Sublayer("attention"), Sublayer("feed_forward"), layers="blocks"), "layers at 'blocks'"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_and_leaves_no_trace(row, message):
    register_family("amber", row)
    model = make_outside("amber")
    cls, state, attributes = type(model), copy.deepcopy(model.state_dict()), set(vars(model))
    with pytest.raises(ValueError, match=message) as error:
        apply_hyper_connections(model)
    assert "layer 0 (AmberLayer)" in str(error.value) or "AmberForCausalLM" in str(error.value)
    assert type(model) is cls
    assert set(vars(model)) == attributes
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    register_family("amber", AMBER)
    assert torch.equal(apply_hyper_connections(model)(TOKENS).logits, make_outside("amber")(TOKENS).logits)


ATTENTION, FEED_FORWARD = Sublayer("attention", "first_norm", attention=True), Sublayer("feed_forward", "second_norm")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "amber",
            LayerSpec((Step("a_hc", (FEED_FORWARD,)), Step("b_hc", (ATTENTION,)))),
            r"says attention\(first_norm\(x\)\); f",
        ),
        (
            "amber",
            block(ATTENTION, FEED_FORWARD),
            r"source of its forward says attention\(first_norm\(x\)\); feed_forward",
        ),
        (
            "amber",
            sequential(replace(ATTENTION, pre="second_norm"), replace(FEED_FORWARD, pre="first_norm")),
            "row says",
        ),
        ("amber", sequential(replace(ATTENTION, pre=None, post=("first_norm",)), FEED_FORWARD), "must be what its row"),
        ("amber", sequential(Sublayer(("first_norm", "attention"), attention=True), FEED_FORWARD), None),
        ("amber", sequential(replace(ATTENTION, scale="first_norm.eps"), FEED_FORWARD), r"first_norm.eps \* attention"),
        (
            "basalt",
            sequential(*BASALT.steps[0].sublayers, layers="blocks"),
            r"says attn_scale \* attn\(ln\(x\)\) \+ fc",
        ),
        (
            "basalt",
            block(Sublayer("attn", "ln", scale="fc_scale"), Sublayer("fc", "ln", scale="attn_scale"), layers="blocks"),
            r"says, fc_scale \* attn.* says attn_scale \* attn",
        ),
        ("cinder", LayerSpec((*CINDER.steps, replace(CINDER.steps[1], name="again_hc"))), r"mlp.*; mlp.* says attn"),
    ],
)
def test_a_row_that_fits_and_says_something_else_is_refused(name, row, message, repositories, tmp_path):
    """Every module is there, and the source computes something else with them."""
    register_family(name, row)
    model = make_outside(name)
    if message is None:  # another way to write the same
        assert torch.equal(apply_hyper_connections(model)(TOKENS).logits, make_outside(name)(TOKENS).logits)
        return
    with pytest.raises(ValueError, match=message):
        apply_hyper_connections(model)
    assert not has_hyper_connections(model)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(repositories[name], tmp_path / "converted", trust_remote_code=True)
    assert not (tmp_path / "converted").exists()


def test_a_layer_of_another_class_is_refused():
    register_family("basalt", BASALT, layer_class="AnotherBlock")
    with pytest.raises(ValueError, match=r"layer 0 \(BasaltBlock\) must be a AnotherBlock"):
        apply_hyper_connections(make_outside("basalt"))


def test_what_a_layer_returns_is_what_was_asked_for():
    """The tuple of a cinder layer is as long as its arguments say, and one of them comes back in it."""
    register_family("cinder", CINDER)
    expected = make_outside("cinder")(TOKENS, use_cache=True, output_attentions=True)
    model = apply_hyper_connections(make_outside("cinder"))
    found = model(TOKENS, use_cache=True, output_attentions=True)
    assert len(found.attentions) == 3
    assert all(map(torch.equal, found.attentions, expected.attentions))
    assert found.past_key_values.get_seq_length() == TOKENS.shape[1]
    assert model(TOKENS, use_cache=False).past_key_values is None
    assert len(model.model.layers[0](torch.zeros(1, 2, 32), torch.ones(1, 1, 2, 2).bool())) == 2


def test_a_layer_that_changes_what_it_hands_back_is_refused():
    """Where its configuration says so; the rest of the family is not."""
    register_family("cinder", CINDER)
    model = make_outside("cinder")
    model.model.layers[1].use_feedback = True
    with pytest.raises(ValueError, match=r"CinderBlock.forward must return .* or it was given; got 'return outputs'"):
        apply_hyper_connections(model)
    assert not has_hyper_connections(model)
