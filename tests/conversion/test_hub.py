"""Push and pull with the real client of huggingface_hub against a Hub on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers.utils.hub
from huggingface_hub import ModelCard, constants
from safetensors.torch import save_file
from support.hub_server import TOKEN, HubServer
from support.remote import visit_without_kromhc
from support.tiny import configurations, make_model, token_ids
from transformers import AutoConfig, AutoModelForCausalLM

from kromhc_hf import (
    KromHCConfig,
    apply_hyper_connections,
    convert_checkpoint,
    freeze_backbone,
    load_hyper_connections,
    push_checkpoint,
    push_hyper_connections,
    save_hyper_connections,
)
from kromhc_hf.cli import main
from kromhc_hf.modeling.model_card import MARK


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that the client of this process talks to, with the right token and an empty cache."""
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def base(tmp_path) -> Path:
    make_model(configurations("llama")[0]).save_pretrained(tmp_path / "base", max_shard_size="60KB")
    (tmp_path / "base/README.md").write_text("---\nlicense: other\nlicense_name: tiny\nlanguage: en\n---\n# Base\n")
    return tmp_path / "base"


@pytest.fixture
def converted(base, tmp_path) -> Path:
    convert_checkpoint(base, tmp_path / "converted", base_model="ada/base", verify=True)
    return tmp_path / "converted"


def push_base(base: Path, repo_id: str = "ada/base") -> str:
    """What somebody else has uploaded; returns the commit."""
    api = huggingface_hub.HfApi()
    api.create_repo(repo_id)
    return api.upload_folder(repo_id=repo_id, folder_path=base).oid


def test_push_and_pull_into_an_empty_cache(hub, converted):
    url = push_checkpoint(converted, "ada/model")
    assert url == f"{hub.url}/ada/model/commit/{hub.repositories['ada/model'].branches['main']}"
    sent = hub.files("ada/model")
    local = {str(path.relative_to(converted)): path.read_bytes() for path in converted.rglob("*") if path.is_file()}
    assert sent.keys() == local.keys()
    assert {name for name in local if sent[name] != local[name]} == {"README.md"}
    model, info = AutoModelForCausalLM.from_pretrained("ada/model", output_loading_info=True)
    assert not any(info.values())
    tokens = token_ids(model.config)
    assert torch.equal(model(tokens).logits, AutoModelForCausalLM.from_pretrained(converted)(tokens).logits)


def test_model_card(hub, converted):
    push_checkpoint(converted, "ada/model")
    card = ModelCard.load("ada/model")
    assert card.data.base_model == "ada/base"
    assert (card.data.license, card.data.license_name) == ("other", "tiny")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert {"kromhc", "hyper-connections"} <= set(card.data.tags)
    for text in (
        "# model",
        'from_pretrained("ada/model")',
        'from_pretrained("ada/model", trust_remote_code=True)',
        "pip install kromhc-hf",
        "| logits | bitwise equal |",
        "| lossless | yes |",
        "random tokens in float32",
        "eprint = {2601.21579}",
    ):
        assert text in card.text, text


def test_a_card_of_ones_own_is_kept(hub, converted):
    own = "---\ntags:\n- mine\n---\n# Mine\n"
    (converted / "README.md").write_text(own)
    push_checkpoint(converted, "ada/model")
    assert hub.files("ada/model")["README.md"].decode() == own
    AutoModelForCausalLM.from_pretrained("ada/model").push_to_hub("ada/model")
    assert ModelCard.load("ada/model").text.strip() == "# Mine"


def test_a_card_with_the_mark_is_written_anew(hub, converted):
    """Whatever else is in it, such as the wording of another version."""
    (converted / "README.md").write_text(f"---\nlicense: mit\n---\n{MARK}\n\n# Older words\n")
    push_checkpoint(converted, "ada/model")
    pushed = hub.files("ada/model")["README.md"].decode()
    assert pushed.splitlines().count(MARK) == 1
    assert "Older words" not in pushed
    assert 'from_pretrained("ada/model")' in pushed
    model = AutoModelForCausalLM.from_pretrained(converted)
    model.config.hc_conversion = {}
    model.push_to_hub("ada/model", tags=["poetry"])
    card = ModelCard.load("ada/model")
    assert "poetry" in card.data.tags
    assert "base_model" not in card.data.to_dict()
    assert card.text.strip().startswith(MARK)


def test_a_configuration_saved_beside_its_model(hub, converted):
    AutoConfig.from_pretrained(converted).save_pretrained(str(converted), push_to_hub=True, repo_id="ada/model")
    card = (converted / "README.md").read_text()
    assert "A configuration with" not in card
    assert 'from_pretrained("ada/model")' in card


@pytest.mark.parametrize("own", [b"# Mine\n", b"\xff\xfe"], ids=["text", "no-utf-8"])
def test_hyper_connections_beside_a_card_of_ones_own(base, tmp_path, own):
    model = apply_hyper_connections(AutoModelForCausalLM.from_pretrained(base))
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


def test_push_from_a_live_model(hub, converted):
    model = AutoModelForCausalLM.from_pretrained(converted)
    with torch.no_grad():
        model.model.layers[0].attn_hc.bias += 0.1
    model.push_to_hub("ada/tuned", tags=["poetry"])
    card = ModelCard.load("ada/tuned")
    assert card.data.base_model == "ada/base"
    assert {"kromhc", "poetry"} <= set(card.data.tags)
    assert "as the conversion wrote it and before any training" in card.text
    files = hub.files("ada/tuned")
    assert {"modeling_kromhc.py", "configuration_kromhc.py", "model.safetensors", "README.md"} <= files.keys()
    auto_map = json.loads(files["config.json"])["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_kromhc.KromHCLlamaForCausalLM"
    tokens = token_ids(model.config)
    assert torch.equal(AutoModelForCausalLM.from_pretrained("ada/tuned")(tokens).logits, model(tokens).logits)


def test_push_of_a_configuration(hub):
    config = KromHCConfig(backbone_config=configurations("llama")[0], hc_num_streams=3)
    config.push_to_hub("ada/config")
    files = hub.files("ada/config")
    assert {"config.json", "modeling_kromhc.py", "README.md"} <= files.keys()
    assert not [name for name in files if name.endswith(".safetensors")]
    assert "A configuration with 3 residual streams" in files["README.md"].decode()
    assert AutoConfig.from_pretrained("ada/config").to_dict() == {**config.to_dict(), "_name_or_path": "ada/config"}


def test_convert_from_a_revision(hub, base, tmp_path):
    old = push_base(base)
    newer = make_model(configurations("llama")[0], seed=7)
    newer.push_to_hub("ada/base", max_shard_size="60KB")
    convert_checkpoint("ada/base", tmp_path / "new")
    convert_checkpoint("ada/base", tmp_path / "old", revision=old, link="symlink")
    tokens = token_ids(newer.config)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "new")(tokens).logits, newer(tokens).logits)
    before = AutoModelForCausalLM.from_pretrained(base)(tokens).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "old")(tokens).logits, before)
    config = AutoConfig.from_pretrained(tmp_path / "old")
    assert config.hc_conversion["base_model"] == "ada/base"
    assert config.hc_conversion["base_revision"] == old
    assert config.hc_conversion["license"] == {"license": "other", "license_name": "tiny"}


def test_pickled_weights_from_the_hub(hub, base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    for file in base.glob("model*"):
        file.unlink()
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    push_base(base)
    convert_checkpoint("ada/base", tmp_path / "out")
    tokens = token_ids(model.config)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits, model(tokens).logits)


def test_pull_one_revision(hub, base, converted):
    push_checkpoint(converted, "ada/model")
    first = hub.repositories["ada/model"].branches["main"]
    model = AutoModelForCausalLM.from_pretrained("ada/model")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        model.model.layers[0].attn_hc.bias += 1
    model.push_to_hub("ada/model")
    model.push_to_hub("ada/model", revision="experiment")
    assert set(hub.repositories["ada/model"].branches) == {"main", "experiment"}
    assert len(hub.repositories["ada/model"].commits) >= 3
    name = "model.layers.0.attn_hc.bias"
    for revision, shift in ((first, 0), ("main", 1), ("experiment", 1)):
        loaded = AutoModelForCausalLM.from_pretrained("ada/model", revision=revision)
        assert torch.equal(loaded.get_parameter(name), before[name] + shift)
    with pytest.raises(OSError, match="nowhere"):
        AutoModelForCausalLM.from_pretrained("ada/model", revision="nowhere")


def test_an_interrupted_upload_goes_on(hub, converted, monkeypatch):
    # The client waits before it tries a broken upload again, 31 s in all.
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    shards = {path.name for path in converted.glob("*.safetensors")}
    assert len(shards) > 3
    hub.uploads_left = 2
    with pytest.raises(OSError, match="upload to 'ada/model' did not finish .* Push the folder again"):
        push_checkpoint(converted, "ada/model")
    assert len(hub.uploads) == 2
    assert hub.files("ada/model") == {}
    hub.uploads_left = None
    push_checkpoint(converted, "ada/model")
    assert len(hub.uploads) == len(set(hub.uploads)) == len(shards)
    assert shards < hub.files("ada/model").keys()
    count = len(hub.repositories["ada/model"].commits)
    push_checkpoint(converted, "ada/model")
    assert len(hub.uploads) == len(shards)
    assert len(hub.repositories["ada/model"].commits) <= count + 1


def test_an_interrupted_download_goes_on(hub, converted, monkeypatch):
    # Only whole chunks survive a broken connection; they are 10 MB by default.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    push_checkpoint(converted, "ada/model")
    hub.broken_downloads = 1
    model = AutoModelForCausalLM.from_pretrained("ada/model")
    assert [asked for asked in hub.ranges if asked is not None]
    tokens = token_ids(model.config)
    assert torch.equal(model(tokens).logits, AutoModelForCausalLM.from_pretrained(converted)(tokens).logits)


@pytest.mark.parametrize("token", ["hf_wrong", ""], ids=["wrong-token", "no-token"])
def test_a_wrong_token_is_refused(hub, converted, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(PermissionError, match=r"token must be allowed to write to 'ada/model'.*hf auth login"):
        push_checkpoint(converted, "ada/model")
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        ("hf_wrong", "ada/model", "must be allowed to write to 'ada/model'; the Hub answered 401"),
        ("", "ada/model", "must be allowed to write to 'ada/model'; there is none. Log in"),
        (TOKEN, "not an id", "the repository must be USER/NAME; got 'not an id'"),
    ],
    ids=["wrong-token", "no-token", "no-id"],
)
def test_nothing_is_converted_for_an_upload_that_cannot_be(
    hub, base, tmp_path, monkeypatch, capsys, token, repo_id, message
):
    monkeypatch.setenv("HF_TOKEN", token)
    command = ["kromhc", "convert", str(base), str(tmp_path / "out"), "--push-to", repo_id]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert hub.repositories == {}


def test_a_hub_that_is_down(hub, converted, monkeypatch):
    hub.shutdown()
    hub.server_close()
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    with pytest.raises(ConnectionError, match="upload to 'ada/model' did not finish"):
        push_checkpoint(converted, "ada/model")


def test_the_namespace_of_somebody_else_is_refused(hub, converted):
    with pytest.raises(PermissionError, match="must be allowed to write to 'bob/model'; the Hub answered 403"):
        push_checkpoint(converted, "bob/model")


def test_a_private_repository_needs_the_token(hub, converted, monkeypatch, tmp_path):
    push_checkpoint(converted, "ada/secret", private=True)
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(OSError, match="ada/secret"):
        AutoModelForCausalLM.from_pretrained("ada/secret")
    with pytest.raises(FileNotFoundError, match="Hub id that can be read; got 'ada/secret'"):
        convert_checkpoint("ada/secret", tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained("ada/secret", token=TOKEN).config.hc_num_streams == 4


def test_only_converted_folders_are_pushed(hub, base):
    with pytest.raises(ValueError, match="must hold a checkpoint with hyper-connections; .* has model_type 'llama'"):
        push_checkpoint(base, "ada/model")
    assert hub.repositories == {}


def tuned(model):
    """The model with other hyper-connections than at the start, and the base as it was."""
    freeze_backbone(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def test_hyper_connections_alone(hub, base, tmp_path):
    commit = push_base(base)
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


def test_hyper_connections_alone_in_a_folder(base, tmp_path):
    model = tuned(apply_hyper_connections(AutoModelForCausalLM.from_pretrained(base)))
    path = save_hyper_connections(model, tmp_path / "alone")
    tokens = token_ids(model.config)
    for source in (path, tmp_path / "alone"):
        assert torch.equal(load_hyper_connections(source)(tokens).logits, model(tokens).logits)
    half = load_hyper_connections(path, dtype=torch.bfloat16)
    assert half.model.layers[0].attn_hc.bias.dtype == torch.float32
    assert str(base) not in (tmp_path / "alone/README.md").read_text()
    with pytest.raises(ValueError, match="must be a Hub id, since others do not have the folder"):
        push_hyper_connections(model, "ada/connections")
    make_model(configurations("gpt2")[0]).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="must be of model_type 'llama'.*is 'gpt2'"):
        load_hyper_connections(path, base_model=tmp_path / "other")
    config = configurations("llama")[0]
    config.num_hidden_layers = 2
    make_model(config).save_pretrained(tmp_path / "shorter")
    with pytest.raises(ValueError, match=r"must hold 'model\.layers\.2.*' with shape None"):
        load_hyper_connections(path, base_model=tmp_path / "shorter")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="must be a complete safetensors file"):
        load_hyper_connections(path)


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


def test_command_line_through_hf_endpoint(hub, base, tmp_path):
    """Another process with nothing but environment variables: convert, push, and load without the package."""
    push_base(base)
    package = Path(__file__).resolve().parents[2]
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(package),
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "kromhc_hf.cli", "convert", "ada/base", tmp_path / "out", "--json"]
    command += ["--link", "hardlink", "--push-to", "ada/pushed"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["lossless"]
    assert f"uploaded: {hub.url}/ada/pushed/commit/" in result.stderr
    online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    report = visit_without_kromhc(tmp_path, {"ada/pushed": tmp_path / "again"}, **online)["ada/pushed"]
    assert not report["installed"]
    assert report["class"] == ["KromHCLlamaForCausalLM", "transformers_modules"]
    assert report["reloaded_equal"]
