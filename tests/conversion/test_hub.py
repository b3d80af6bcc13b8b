"""Uploads and downloads with the real client of huggingface_hub against a Hub on this machine."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import HTTPError
from support.folders import to_earlier_layout
from support.hub_client import push_base
from support.hub_server import TOKEN
from support.remote import visit_without_kromhc
from support.tiny import configurations, make_model, token_ids
from transformers import AutoConfig, AutoModelForCausalLM

from kromhc_hf import KromHCConfig, convert_checkpoint, push_checkpoint, verify_conversion
from kromhc_hf.cli import main


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


def test_what_git_downloads_and_trainings_keep_beside_a_model_stays_here(hub, converted):
    hidden = {".git/HEAD", ".cache/huggingface/download/config.json.metadata", "tokens/.cache/x"}
    hidden |= {"checkpoint-20/model.safetensors", "runs/checkpoint-4/optimizer.pt"}
    for name in (*hidden, ".gitattributes", "checkpoint-notes/x", "checkpoint-7"):
        (converted / name).parent.mkdir(parents=True, exist_ok=True)
        (converted / name).write_text("x")
    push_checkpoint(converted, "ada/model")
    present = {path.relative_to(converted).as_posix() for path in converted.rglob("*") if path.is_file()}
    assert present - hub.files("ada/model").keys() == hidden


@pytest.mark.parametrize("other", ["base", "earlier-layout", "trained"])
def test_a_push_replaces_the_weights_that_are_there(hub, base, tmp_path, other):
    """Weights of before under a name that the new ones do not use would be loaded in their place."""
    convert_checkpoint(base, tmp_path / "out", init="paper")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    if other == "base":
        push_base(base, "ada/model")
    elif other == "trained":
        model.save_pretrained(tmp_path / "trained")
        push_checkpoint(tmp_path / "trained", "ada/model")
    else:
        to_earlier_layout(tmp_path / "out", tmp_path / "earlier")
        push_checkpoint(tmp_path / "earlier", "ada/model")
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="voice.safetensors", repo_id="ada/model")
    push_checkpoint(tmp_path / "out", "ada/model", revision="new")
    weights = {name for name in hub.files("ada/model", "new") if "safetensors" in name}
    assert weights == {path.name for path in (tmp_path / "out").glob("*safetensors*")} | {"voice.safetensors"}
    loaded, info = AutoModelForCausalLM.from_pretrained("ada/model", revision="new", output_loading_info=True)
    assert not any(info.values())
    tokens = token_ids(model.config)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert "model-00001-of-00002.safetensors" not in hub.files("ada/model")


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


def test_convert_from_a_revision(hub, licensed_base, tmp_path):
    old = push_base(licensed_base)
    newer = make_model(configurations("llama")[0], seed=7)
    newer.push_to_hub("ada/base", max_shard_size="60KB")
    convert_checkpoint("ada/base", tmp_path / "new")
    convert_checkpoint("ada/base", tmp_path / "old", revision=old, link="symlink")
    tokens = token_ids(newer.config)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "new")(tokens).logits, newer(tokens).logits)
    before = AutoModelForCausalLM.from_pretrained(licensed_base)(tokens).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "old")(tokens).logits, before)
    config = AutoConfig.from_pretrained(tmp_path / "old")
    assert config.hc_conversion["base_model"] == "ada/base"
    assert config.hc_conversion["base_revision"] == old
    assert config.hc_conversion["license"] == {"license": "other", "license_name": "tiny"}
    # Verified against what it was made from, whatever has been pushed since.
    assert verify_conversion("ada/base", tmp_path / "old").bitwise_equal
    assert not verify_conversion("ada/base", tmp_path / "old", revision="main").lossless


def test_pickled_weights_from_the_hub(hub, licensed_base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(licensed_base)
    for file in licensed_base.glob("model*"):
        file.unlink()
    torch.save(model.state_dict(), licensed_base / "pytorch_model.bin")
    push_base(licensed_base)
    convert_checkpoint("ada/base", tmp_path / "out")
    tokens = token_ids(model.config)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits, model(tokens).logits)


def test_pull_one_revision(hub, licensed_base, converted):
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
    # Early clients of the Hub go on only when they are asked again.
    with suppress(HTTPError):
        AutoModelForCausalLM.from_pretrained("ada/model")
    model = AutoModelForCausalLM.from_pretrained("ada/model")
    assert [asked for asked in hub.ranges if asked is not None]
    tokens = token_ids(model.config)
    assert torch.equal(model(tokens).logits, AutoModelForCausalLM.from_pretrained(converted)(tokens).logits)


def test_a_download_that_keeps_breaking_off(hub, base, tmp_path):
    push_base(base)
    hub.broken_downloads = 1000
    with pytest.raises(FileNotFoundError, match=r"source must be .* a Hub id that can be read; got 'ada/base' \(.+\)"):
        convert_checkpoint("ada/base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
    hub, licensed_base, tmp_path, monkeypatch, capsys, token, repo_id, message
):
    monkeypatch.setenv("HF_TOKEN", token)
    command = ["kromhc", "convert", str(licensed_base), str(tmp_path / "out"), "--push-to", repo_id]
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


def test_private_is_for_new_repositories(hub, converted, licensed_base, tmp_path, kromhc):
    push_checkpoint(converted, "ada/open")
    refused = "private is for a new repository; ada/open exists and is public"
    with pytest.raises(ValueError, match=refused):
        push_checkpoint(converted, "ada/open", private=True)
    code, out, err = kromhc("convert", licensed_base, tmp_path / "out", "--push-to", "ada/open", "--private")
    assert (code, out, refused in " ".join(err.split())) == (2, "", True)
    assert not (tmp_path / "out").exists()
    push_checkpoint(converted, "ada/secret", private=True)
    push_checkpoint(converted, "ada/secret", private=True)


def test_a_private_repository_needs_the_token(hub, converted, monkeypatch, tmp_path):
    push_checkpoint(converted, "ada/secret", private=True)
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(OSError, match="ada/secret"):
        AutoModelForCausalLM.from_pretrained("ada/secret")
    with pytest.raises(FileNotFoundError, match="Hub id that can be read; got 'ada/secret'"):
        convert_checkpoint("ada/secret", tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained("ada/secret", token=TOKEN).config.hc_num_streams == 4


def test_only_converted_folders_are_pushed(hub, licensed_base):
    with pytest.raises(ValueError, match="must hold a checkpoint with hyper-connections; .* has model_type 'llama'"):
        push_checkpoint(licensed_base, "ada/model")
    assert hub.repositories == {}


def test_command_line_through_hf_endpoint(hub, licensed_base, tmp_path):
    """Another process with nothing but environment variables: convert, push, and load without the package."""
    push_base(licensed_base)
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
