"""Hyper-connections without their base, in a folder and on the Hub."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from support.hub_client import push_base
from support.tiny import configurations, make_model, token_ids
from transformers import AutoModelForCausalLM

from kromhc_hf import (
    apply_hyper_connections,
    freeze_backbone,
    load_hyper_connections,
    push_hyper_connections,
    save_hyper_connections,
)
from kromhc_hf.modeling.model_card import MARK


def tuned(model):
    """The model with other hyper-connections than at the start, and the base as it was."""
    freeze_backbone(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def test_hyper_connections_alone(hub, licensed_base, tmp_path):
    commit = push_base(licensed_base)
    options = {"num_streams": 6, "readout": "softmax", "stream_embedding": True, "residual_logit": 3.0}
    model = tuned(apply_hyper_connections(AutoModelForCausalLM.from_pretrained("ada/base"), **options))
    push_hyper_connections(model, "ada/connections")
    make_model(configurations("llama")[0], seed=7).push_to_hub("ada/base", max_shard_size="60KB")
    files = hub.files("ada/connections")
    assert files.keys() == {"hyper_connections.safetensors", "README.md"}
    card = ModelCard.load("ada/connections")
    assert card.data.base_model == "ada/base"
    assert card.data.library_name == "kromhc-hf"
    assert commit in card.text
    assert 'load_hyper_connections("ada/connections")' in card.text
    loaded = load_hyper_connections("ada/connections")
    tokens = token_ids(model.config)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.config.hc_residual_logit == 3.0
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) * 4
    assert size <= len(files["hyper_connections.safetensors"]) < 1.5 * size + 20_000


def test_hyper_connections_alone_in_a_folder(licensed_base, tmp_path):
    model = tuned(apply_hyper_connections(AutoModelForCausalLM.from_pretrained(licensed_base)))
    path = save_hyper_connections(model, tmp_path / "alone")
    tokens = token_ids(model.config)
    for source in (path, tmp_path / "alone"):
        assert torch.equal(load_hyper_connections(source)(tokens).logits, model(tokens).logits)
    plain = apply_hyper_connections(AutoModelForCausalLM.from_pretrained(licensed_base), num_streams=1)
    assert load_hyper_connections(save_hyper_connections(plain, tmp_path / "one")).config.hc_num_streams == 1
    half = load_hyper_connections(path, dtype=torch.bfloat16)
    assert half.model.layers[0].attn_hc.bias.dtype == torch.float32
    assert str(licensed_base) not in (tmp_path / "alone/README.md").read_text()
    with pytest.raises(ValueError, match="must be a Hub id, since others do not have the folder"):
        push_hyper_connections(model, "ada/connections")
    make_model(configurations("gpt2")[0]).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="must be of model_type 'llama'.*is 'gpt2'"):
        load_hyper_connections(path, base_model=tmp_path / "other")
    config = configurations("llama")[0]
    config.num_hidden_layers = 2
    make_model(config).save_pretrained(tmp_path / "shorter")
    with pytest.raises(ValueError, match=r"must be the base that .* were made for, .*embed_tokens"):
        load_hyper_connections(path, base_model=tmp_path / "shorter")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="must be a complete safetensors file"):
        load_hyper_connections(path)


@pytest.mark.parametrize("own", [b"# Mine\n", b"\xff\xfe"], ids=["text", "no-utf-8"])
def test_hyper_connections_beside_a_card_of_ones_own(licensed_base, tmp_path, own):
    model = apply_hyper_connections(AutoModelForCausalLM.from_pretrained(licensed_base))
    card = tmp_path / "alone/README.md"
    save_hyper_connections(model, card.parent)
    written = card.read_text()
    assert MARK in written
    card.write_text(MARK)
    save_hyper_connections(model, card.parent)
    assert card.read_text() == written
    card.write_bytes(own)
    assert save_hyper_connections(model, card.parent).is_file()
    assert card.read_bytes() == own


def test_hyper_connections_beside_a_whole_model_leave_its_card(licensed_base, tmp_path):
    model = apply_hyper_connections(AutoModelForCausalLM.from_pretrained(licensed_base))
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    card.write_text(f"{MARK}\nof the whole model")
    assert save_hyper_connections(model, tmp_path).is_file()
    assert card.read_text() == f"{MARK}\nof the whole model"


@pytest.mark.parametrize(
    ("change", "got"),
    [
        *(({key: None}, f"got {{.*}}, without '{key}'") for key in ("base_model", "base_revision", "model_type")),
        ({"options": None}, "got {.*}, without 'options'"),
        ({"options": ["num_streams"]}, r"got {.*\['num_streams'\]}"),
        ({"options": {"n": 4}}, "got {.*{'n': 4}}"),
        (None, "got None, without 'base_model'"),
    ],
    ids=["no-base", "no-revision", "no-model-type", "no-options", "list", "unknown-option", "nothing"],
)
def test_a_file_that_does_not_say_what_it_belongs_to(tmp_path, change, got):
    description = {"base_model": "ada/base", "base_revision": None, "model_type": "llama", "options": {}}
    for key, value in (change or {}).items():
        description[key] = value
        if value is None:
            del description[key]
    path = tmp_path / "hyper_connections.safetensors"
    metadata = {"kromhc": json.dumps(None if change is None else description)}
    save_file({"a": torch.zeros(1)}, path, metadata=metadata)
    message = f"{path.name} must say which base and options .*; {got}. Save it again with save_hyper_connections"
    with pytest.raises(ValueError, match=message):
        load_hyper_connections(path)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (None, r"config.json does not exist\)"),
        ("{}", r"config.json has model_type None\)"),
        ('{"model_type": "gpt2"}', r"config.json has model_type 'gpt2'\)"),
    ],
    ids=["no-config", "no-model-type", "other-model-type"],
)
def test_a_folder_that_is_no_base_of_hyper_connections(tmp_path, config, reason):
    model = apply_hyper_connections(make_model(configurations("llama")[0]))
    (tmp_path / "base").mkdir()
    if config is not None:
        (tmp_path / "base/config.json").write_text(config)
    with pytest.raises(ValueError, match=rf"of model_type 'llama'; got .*{reason}. Give it: base_model='ORG/NAME'"):
        save_hyper_connections(model, tmp_path / "alone", base_model=str(tmp_path / "base"))
    assert not (tmp_path / "alone").exists()


def test_hyper_connections_alone_need_their_base(hub, converted, tmp_path):
    model = apply_hyper_connections(make_model(configurations("llama")[0]))
    with pytest.raises(ValueError, match="base_model must be the Hub id or folder of a base checkpoint"):
        save_hyper_connections(model, tmp_path / "alone")
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="base_model must be the Hub id or folder of a base checkpoint"):
        save_hyper_connections(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), tmp_path / "alone")
    with pytest.raises(ValueError, match="model must have hyper-connections"):
        save_hyper_connections(make_model(configurations("llama")[0]), tmp_path / "alone")
    assert not (tmp_path / "alone").exists()
    with pytest.raises(FileNotFoundError, match="source must be a folder or Hub id with hyper_connections.safetensors"):
        load_hyper_connections("ada/nothing")
