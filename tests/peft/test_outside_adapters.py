"""Adapters of hyper-connections on families from outside, whose rows name their steps themselves."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.adapters import adapter_config, perturb
from support.outside import forget_families, make_outside, make_repository
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from kromhc_hf import KromHCForCausalLM, adapter_to_model, apply_hyper_connections, register_family
from kromhc_hf.cli import app
from kromhc_hf.modeling.outside_families import REGISTERED
from kromhc_hf.rows import LayerSpec, Step, Sublayer


ROW = LayerSpec(
    (
        Step("step_0_hc", (Sublayer("attention", "first_norm", attention=True),)),
        Step("last_hc", (Sublayer("feed_forward", "second_norm"),)),
    )
)
ROW_FILE = """
from kromhc_hf import register_family
from kromhc_hf.modeling.outside_families import REGISTERED
from kromhc_hf.rows import LayerSpec, Step, Sublayer
attention, feed_forward = Sublayer("attention", "first_norm", attention=True), Sublayer("feed_forward", "second_norm")
register_family("amber", LayerSpec((Step("step_0_hc", (attention,)), Step("last_hc", (feed_forward,)))))
"""
TOKENS = torch.tensor([[1, 5, 9, 3, 7, 2]])


@pytest.fixture(autouse=True)
def row(nothing_registered):
    register_family("amber", ROW)


def test_an_adapter_is_trained_saved_loaded_and_made_a_full_model(tmp_path):
    expected = make_outside("amber")(TOKENS).logits
    model = get_peft_model(make_outside("amber"), adapter_config(num_streams=2))
    assert torch.equal(model(TOKENS).logits, expected)
    perturb(model)
    changed = model(TOKENS).logits
    assert not torch.equal(changed, expected)
    model.save_pretrained(tmp_path)
    # The row is in the file.
    forget_families()
    loaded = PeftModel.from_pretrained(make_outside("amber"), tmp_path)
    assert torch.equal(loaded(TOKENS).logits, changed)
    assert REGISTERED["amber"].row == ROW
    full = adapter_to_model(loaded)
    assert isinstance(full, KromHCForCausalLM)
    assert torch.equal(full(TOKENS).logits, changed)


def test_a_row_that_does_not_hold_is_refused_and_forgotten(tmp_path):
    get_peft_model(make_outside("amber"), adapter_config()).save_pretrained(tmp_path)
    forget_families()
    path = tmp_path / "adapter_config.json"
    good = path.read_text()
    for place, name, message in (
        ("first_norm", "no_norm", r"layer 0 \(AmberLayer\) must have a module 'no_norm'"),
        ("first_norm", "__class__", r"base_family of the adapter: row 1 must name attributes of a layer"),
        ("step_0_hc", "expand_hc", r"the name of a step must be one that ends in '_hc'"),
        ("steps", "words", r"row 1 must have one of sequential, block and steps; it has words"),
    ):
        path.write_text(good.replace(place, name))
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(make_outside("amber"), tmp_path)
        assert not REGISTERED


def test_lora_that_trains_them_is_loaded_where_they_are_and_refused_elsewhere(tmp_path):
    lora = LoraConfig(target_modules=["gate"], modules_to_save=["step_0_hc", "last_hc"])
    with pytest.raises(ValueError, match=r"AmberForCausalLM has none"):
        get_peft_model(make_outside("amber"), lora)
    lora = LoraConfig(target_modules="all-linear", modules_to_save=["step_0_hc", "last_hc"], init_lora_weights=False)
    model = get_peft_model(apply_hyper_connections(make_outside("amber")), lora)
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(apply_hyper_connections(make_outside("amber")), tmp_path)
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    # Also where nobody has said what the layers look like.
    forget_families()
    with pytest.raises(ValueError, match=r"modules_to_save=\['last_hc', 'step_0_hc'\].*AmberForCausalLM has none"):
        PeftModel.from_pretrained(make_outside("amber"), tmp_path)


def test_the_command_makes_a_full_model_and_an_adapter_again(tmp_path):
    base = make_repository("amber", tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True), adapter_config())
    perturb(model)
    expected = model(TOKENS).logits
    model.save_pretrained(tmp_path / "adapter")
    forget_families()
    run, family = CliRunner().invoke, ["--family", str(tmp_path / "family.py")]
    alone = ["adapter", str(tmp_path / "adapter"), str(tmp_path / "alone"), "--trust-remote-code"]
    done = run(app, alone)
    assert done.exit_code == 0, done.stderr
    forget_families()
    # One that was saved before adapters had their row.
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_family": None}))
    (tmp_path / "family.py").write_text(ROW_FILE)
    there = ["adapter", str(tmp_path / "adapter"), str(tmp_path / "full")]
    refused = run(app, there)
    assert refused.exit_code == 2
    assert "--family FILE" in refused.stderr
    refused = run(app, [*there, *family])
    assert "--trust-remote-code" in refused.stderr
    done = run(app, [*there, *family, "--trust-remote-code"])
    assert done.exit_code == 0, done.stderr
    forget_families()
    for folder in ("alone", "full"):
        full = AutoModelForCausalLM.from_pretrained(tmp_path / folder, trust_remote_code=True)
        assert torch.equal(full(TOKENS).logits, expected)
    # The folder brings its row along.
    back = ["adapter", str(tmp_path / "full"), str(tmp_path / "again"), "--base", str(base), "--trust-remote-code"]
    done = run(app, back)
    assert done.exit_code == 0, done.stderr
    forget_families()
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True), tmp_path / "again"
    )
    assert torch.equal(again(TOKENS).logits, expected)
