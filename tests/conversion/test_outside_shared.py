"""Families from outside on the Hub, and their hyper-connections without the base."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.outside import BASES, OUTSIDE, forget_families, make_repository
from support.remote import visit_without_kromhc
from transformers import AutoModelForCausalLM, LlamaConfig

from kromhc_hf import (
    apply_hyper_connections,
    convert_checkpoint,
    has_hyper_connections,
    load_hyper_connections,
    push_checkpoint,
    register_family,
    save_hyper_connections,
)
from kromhc_hf.carried_row import row_to_carry, with_carried_row
from kromhc_hf.modeling.families import ROWS
from kromhc_hf.modeling.layer_spec import layer_kinds
from kromhc_hf.modeling.outside_families import REGISTERED, OutsideFamily


TOKENS = torch.tensor([[1, 5, 9, 3, 7, 2]])
CINDER = OUTSIDE["cinder"]


@pytest.fixture
def base(tmp_path):
    register_family("cinder", CINDER.row, layer_class=CINDER.layer_class)
    yield make_repository("cinder", tmp_path / "base")
    forget_families()


def load(source):
    return AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)


def test_a_converted_model_is_pushed_and_loaded_by_whoever_trusts_it(hub, base, tmp_path):
    register_family("cinder", replace(CINDER.row, derived=True))
    convert_checkpoint(base, tmp_path / "out", layers="1:3", trust_remote_code=True)
    forget_families()
    push_checkpoint(tmp_path / "out", "ada/cinder")
    sent = hub.files("ada/cinder")
    named = (tmp_path / "out/README.md").read_text().replace('"out"', '"ada/cinder"').replace("# out", "# cinder")
    assert sent["README.md"].decode() == named
    assert "a row that was derived" in named
    for file in (BASES / "cinder").glob("*_*.py"):
        assert sent[file.name] == file.read_bytes()
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained("ada/cinder", trust_remote_code=False)
    model = load("ada/cinder")
    assert has_hyper_connections(model)
    assert torch.equal(model(TOKENS).logits, load(base)(TOKENS).logits)
    model.push_to_hub("ada/again")
    assert hub.files("ada/again").keys() >= {name for name in sent if name.endswith(".py")}
    online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    seen = visit_without_kromhc(tmp_path, {"ada/again": tmp_path / "away"}, **online)["ada/again"]
    assert not seen["installed"]
    assert seen["class"] == ["KromHCCinderForCausalLM", "transformers_modules"]
    assert seen["reloaded_equal"]


def test_hyper_connections_alone_bring_their_row_and_want_trust(base, tmp_path):
    model = apply_hyper_connections(load(base), init="paper")
    path = save_hyper_connections(model, tmp_path / "alone", base_model=str(base))
    expected = model(TOKENS).logits
    forget_families()
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load_hyper_connections(tmp_path / "alone")
    loaded = load_hyper_connections(tmp_path / "alone", trust_remote_code=True)
    assert torch.equal(loaded(TOKENS).logits, expected)
    assert REGISTERED["cinder"] == OutsideFamily("cinder", CINDER.row, CINDER.layer_class)

    forget_families()
    register_family("cinder", replace(CINDER.row, derived=True))
    save_hyper_connections(apply_hyper_connections(load(base)), tmp_path / "derived", base_model=str(base))
    forget_families()
    assert "derived" in repr(load_hyper_connections(tmp_path / "derived", trust_remote_code=True))

    # A file that was saved before it had the row.
    forget_families()
    description = json.loads(safe_open(path, "pt").metadata()["kromhc"])
    del description["family"]
    save_file(load_file(path), path, metadata={"kromhc": json.dumps(description)})
    with pytest.raises(ValueError, match="'cinder'. .* say what its layers look like with register_family"):
        load_hyper_connections(tmp_path / "alone", trust_remote_code=True)
    register_family("cinder", CINDER.row)
    loaded = load_hyper_connections(tmp_path / "alone", trust_remote_code=True)
    assert torch.equal(loaded(TOKENS).logits, expected)


def test_every_row_can_be_carried():
    """All rows that there are, through JSON."""

    class MineConfig(LlamaConfig):
        model_type = "mine"

    kinds = {kind for row in ROWS.values() for kind in layer_kinds(row)}
    assert len(kinds) > 30
    for kind in kinds:
        register_family("mine", kind)
        carried = json.loads(json.dumps(row_to_carry(MineConfig())))
        forget_families()
        with with_carried_row("mine", carried, "a file"):
            assert REGISTERED["mine"].row == kind
        forget_families()
