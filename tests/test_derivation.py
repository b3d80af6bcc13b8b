"""Rows read from the source of layers: the same as the table's, checked on the model, never silent, else refused."""

import contextlib
import copy
import json

import pytest
import torch
from support.bases.amber.modeling_amber import AmberLayer, AmberModel
from support.outside import BASALT, OUTSIDE, forget_families, make_outside, make_repository
from support.tiny import configurations, make_model, separate_streams, token_ids, variants
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast
from typer.testing import CliRunner

from kromhc_hf import (
    KromHCConfig,
    apply_hyper_connections,
    convert_checkpoint,
    derive_family,
    has_hyper_connections,
    register_family,
)
from kromhc_hf.cli import app
from kromhc_hf.derivation import derived_row
from kromhc_hf.modeling.composite import replace_config
from kromhc_hf.modeling.connection_plan import ConnectionPlan, find_decoder, plan_connections
from kromhc_hf.modeling.installation import install
from kromhc_hf.modeling.layer_fit import fit_layer
from kromhc_hf.modeling.layer_spec import layer_kinds
from kromhc_hf.modeling.modeling_kromhc import model_class
from kromhc_hf.modeling.outside_families import REGISTERED
from kromhc_hf.modeling.releases import has_family
from kromhc_hf.row_contradiction import without_names
from kromhc_hf.row_reading import read_row


# Families with a row in the table, of which none can be read: the forward of each does more than sum calls.
NOT_READ = {
    *("bloom", "ctrl", "dbrx", "falcon-0", "falcon-1", "falcon-2", "falcon-3", "falcon_h1", "falcon_mamba"),
    *("gemma4_text-0", "gemma4_text-1", "gemma4_unified_text", "gpt2", "gpt_bigcode", "gpt_neox_japanese"),
    *("inkling_text", "llama4_text", "mamba", "mamba2", "moshi", "mpt", "nemotron_h", "opt", "qwen3_5_moe_text"),
    *("qwen3_next", "recurrent_gemma", "xglm"),
}
TOKENS = torch.tensor([[1, 5, 9, 3, 7, 2]])


pytestmark = pytest.mark.usefixtures("nothing_registered")


def continued(model, tokens: torch.Tensor) -> list[list[int]]:
    return model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0).tolist()


def read(decoder) -> list | None:
    """What is read of every layer, None where one is refused or does not fit what was read of it."""
    try:
        specs = [read_row(layer, decoder.candidates[0].layers) for layer in decoder.layers]
        return [fit_layer(layer, (spec,), i) for i, (layer, spec) in enumerate(zip(decoder.layers, specs))]
    except ValueError:
        return None


@pytest.mark.parametrize(("name", "model_type", "position"), variants(), ids=[name for name, *_ in variants()])
def test_what_is_read_computes_what_the_table_computes(name, model_type, position):
    """Bit for bit, with streams that differ."""
    model = make_model(configurations(model_type)[position])
    other, decoder = copy.deepcopy(model), find_decoder(model)
    specs = read(decoder)
    assert (specs is None) == (name in NOT_READ)
    for layer, spec in zip(decoder.layers, plan_connections(model).specs):
        with contextlib.suppress(ValueError):
            assert without_names(read_row(layer)) == without_names(spec)
    if specs is None:
        return
    apply_hyper_connections(model)
    config = KromHCConfig(backbone_config=other.config)
    replace_config(other, config)
    install(ConnectionPlan(find_decoder(other), specs), model_class)
    tokens = token_ids(model.config)
    before = model(tokens).logits
    for connected in (model, other):
        separate_streams(connected)
    expected = model(tokens).logits
    assert not torch.equal(expected, before)
    assert torch.equal(other(tokens).logits, expected)
    assert continued(other, tokens[:1]) == continued(model, tokens[:1])


@pytest.mark.parametrize(("name", "row"), [(name, base.row) for name, base in OUTSIDE.items()])
def test_a_model_without_a_row_gets_one(name, row):
    model = make_outside(name).train()
    model.base_model.eval()
    before, cls = copy.deepcopy(model.state_dict()), type(model)
    modes = [module.training for module in model.modules()]
    derived = derive_family(model)
    assert type(model) is cls
    assert [module.training for module in model.modules()] == modes
    model.eval()
    assert not has_hyper_connections(model)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert all(kind.derived for kind in layer_kinds(derived))
    apply_hyper_connections(model)
    assert "row derived from the source" in repr(model)
    forget_families()
    register_family(name, row)
    other = apply_hyper_connections(make_outside(name))
    assert "derived" not in repr(other)
    for connected in (model, other):
        separate_streams(connected)
    assert torch.equal(model(TOKENS).logits, other(TOKENS).logits)


def test_the_report_and_the_card_say_that_it_was_derived(tmp_path):
    base = make_repository("basalt", tmp_path / "basalt_repository")
    runner, out = CliRunner(), tmp_path / "converted"
    told = runner.invoke(app, ["families", str(base), "--trust-remote-code", "--json"])
    assert told.exit_code == 0, told.stderr
    (row,) = json.loads(told.stdout)
    assert row["supported"]
    assert "--derive" in row["exactness"]
    assert row["description"] == "attn_scale * attn(ln(x)) + fc_scale * fc(ln(x))"
    assert not REGISTERED
    report = convert_checkpoint(base, out, trust_remote_code=True, derive=True, verify=True)
    assert report.derived
    assert report.bitwise_equal
    assert "derived from their source" in (out / "README.md").read_text()
    assert "derived=True" in (out / "kromhc_family.py").read_text()
    # Where nothing is derived, nothing says so.
    forget_families()
    register_family("basalt", BASALT)
    report = convert_checkpoint(base, tmp_path / "written", trust_remote_code=True)
    assert not report.derived
    assert "derived" not in (tmp_path / "written/README.md").read_text()


class GatedLayer(AmberLayer):
    """A layer whose residual is scaled."""

    def forward(self, hidden_states, attention_mask=None, past_key_values=None):
        residual = hidden_states * 0.5
        hidden_states = self.attention(self.first_norm(hidden_states), attention_mask, past_key_values)
        return residual + hidden_states


class TwiceModel(AmberModel):
    """Runs its layers twice."""

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, use_cache=None, **kwargs):
        hidden_states = self.embed_tokens(input_ids)
        for _ in range(2):
            for layer in self.layers:
                hidden_states = layer(hidden_states)
        return BaseModelOutputWithPast(self.norm(hidden_states))


class DeafLayer(AmberLayer):
    """What can be read of it is not what it computes: its attention looks at the layer behind the reader's back."""

    def forward(self, hidden_states, attention_mask=None, past_key_values=None):
        residual = hidden_states
        hidden_states = self.first_norm(hidden_states)
        hidden_states = self.attention(hidden_states, attention_mask, past_key_values)
        self.bent = 0.5
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.second_norm(hidden_states)
        hidden_states = self.feed_forward(hidden_states)
        return residual + hidden_states

    def __call__(self, *args, **kwargs):
        self.bent = 1.0
        output = super().__call__(*args, **kwargs)
        return output * self.bent


def with_layers(cls):
    model = make_outside("amber")
    for layer in model.model.layers:
        layer.__class__ = cls
    return model


def test_a_line_that_is_not_understood_is_named():
    with pytest.raises(ValueError, match=r"`hidden_states \* 0\.5` is no branch times an attribute"):
        derive_family(with_layers(GatedLayer))
    assert not REGISTERED


class EitherLayer(AmberLayer):
    """Of one class, and of two kinds with the same modules."""

    side_by_side = False

    def forward(self, hidden_states, attention_mask=None, past_key_values=None):
        if self.side_by_side:
            attended = self.attention(self.first_norm(hidden_states), attention_mask, past_key_values)
            return hidden_states + (attended + self.feed_forward(self.second_norm(hidden_states)))
        hidden_states = hidden_states + self.attention(self.first_norm(hidden_states), attention_mask, past_key_values)
        return hidden_states + self.feed_forward(self.second_norm(hidden_states))


def test_layers_of_one_class_that_no_row_tells_apart_are_refused():
    model = with_layers(EitherLayer)
    model.model.layers[1].side_by_side = True
    with pytest.raises(ValueError, match=r"layer 1 \(EitherLayer\) .* another layer of its class too"):
        derive_family(model)
    assert not REGISTERED
    register_family("amber", OUTSIDE["amber"].row)
    with pytest.raises(ValueError, match=r"layer 1 \(EitherLayer\) must be what its row says"):
        apply_hyper_connections(model)


def test_layers_that_run_several_times_are_refused():
    model = make_outside("amber")
    model.model.__class__ = TwiceModel
    with pytest.raises(ValueError, match=r"in the order \[0, 1, 2, 0, 1, 2\], and not each one once"):
        derive_family(model)
    assert not REGISTERED


def test_what_computes_something_else_with_hyper_connections_is_refused():
    model = make_outside("amber")
    model.model.layers[-1].__class__ = DeafLayer
    with pytest.raises(ValueError, match="has logits that differ by"):
        derive_family(model)
    assert not REGISTERED
    assert not has_hyper_connections(model)
    with pytest.raises(ValueError, match="supported families; got 'amber'"):
        apply_hyper_connections(model)


@pytest.mark.skipif(not has_family("hrm_text"), reason="this release of transformers does not have it")
def test_hrm_text_is_refused():
    """Two stacks that run several times each, whose layers taken alone look like Llama's."""
    config = AutoConfig.for_model(
        "hrm_text", hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=99
    )
    config.num_hidden_layers = 2
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match="one loop over a list of layers for a row to be read; it has 0"):
        derive_family(model)


def test_a_family_that_has_a_row_is_not_read():
    model = make_model(configurations("llama")[0])
    with pytest.raises(ValueError, match="native class is supported"):
        derive_family(model)
    with pytest.raises(ValueError, match="native class is supported"):
        derived_row(model)
    register_family("amber", OUTSIDE["amber"].row)
    with pytest.raises(ValueError, match="has a row already"):
        derive_family(make_outside("amber"))
