"""What a base must be, what is taken over from it, and that it is not changed and does not change."""

import json
import os
import shutil
from pathlib import Path

import pytest
from support.folders import contents, only
from support.tiny import configurations, make_model
from transformers import AutoConfig

from kromhc_hf import convert_checkpoint
from kromhc_hf.conversion.files import find_weights


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "must hold safetensors weights"),
        (lambda f: truncate(f / "model.safetensors"), ValueError, "must be a complete safetensors file"),
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "must have a config.json"),
        (lambda f: (f / "config.json").write_text("{"), ValueError, "must be a JSON file"),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "bert"}'),
            ValueError,
            "'bert' is not supported: the norm follows",
        ),
    ],
    ids=["no-weights", "truncated", "no-config", "broken-config", "unknown-family"],
)
def test_a_bad_source_leaves_nothing(base, tmp_path, spoil, error, message):
    spoil(base)
    with pytest.raises(error, match=message):
        convert_checkpoint(base, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_damaged_shard_or_index_is_named(tmp_path):
    make_model(configurations("llama")[0]).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    index = tmp_path / "base/model.safetensors.index.json"
    shard = sorted((tmp_path / "base").glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    truncate(shard)
    with pytest.raises(ValueError, match=f"{shard.name} must be a complete safetensors file"):
        convert_checkpoint(tmp_path / "base", tmp_path / "out")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"names the file '{shard.name}'"):
        convert_checkpoint(tmp_path / "base", tmp_path / "out")
    shard.write_bytes(whole)
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.9.weight"] = shard.name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"must hold 'model\.layers\.9\.weight'"):
        convert_checkpoint(tmp_path / "base", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_converted_source_is_refused(base, tmp_path):
    convert_checkpoint(base, tmp_path / "out")
    with pytest.raises(ValueError, match="has been converted already .* Convert its base model instead"):
        convert_checkpoint(tmp_path / "out", tmp_path / "twice")


def test_a_source_that_is_nowhere(tmp_path):
    with pytest.raises(FileNotFoundError, match="source must be an existing folder or a Hub id .*no/such"):
        convert_checkpoint("no/such", tmp_path / "out")


def test_an_adapter_is_refused(base, tmp_path):
    (base / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"source must be a full model; .* Merge the adapter first"):
        convert_checkpoint(base, tmp_path / "out")
    assert only(tmp_path, "base")


@pytest.mark.parametrize(
    ("base_model", "message"), [("not an id", "base_model must be a Hub id"), ("a/b/c", "base_model must be a Hub id")]
)
def test_base_model_is_a_hub_id(base, tmp_path, base_model, message):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(base, tmp_path / "out", base_model=base_model)
    assert only(tmp_path, "base")


def test_reads_from_a_read_only_source(base, tmp_path):
    shutil.copytree(base, tmp_path / "copy")
    for path in base.iterdir():
        os.chmod(path, 0o444)
    convert_checkpoint(base, tmp_path / "out")
    assert contents(base) == contents(tmp_path / "copy")


def rewrite(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8] + b"12345678")


def replace(path: Path) -> None:
    path.with_name("new").write_bytes(path.read_bytes())
    path.with_name("new").rename(path)


@pytest.mark.parametrize("link", ["copy", "hardlink", "symlink"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model-00002-of-00004.safetensors", rewrite),
        ("model-00002-of-00004.safetensors", replace),
        ("model-00001-of-00004.safetensors", Path.unlink),
        ("config.json", rewrite),
        ("generation_config.json", rewrite),
    ],
    ids=["rewritten", "replaced", "removed", "config", "companion"],
)
def test_a_source_that_changes(sharded_base, tmp_path, link, name, change):
    (target,) = sharded_base.glob(name.replace("00004", "*"))
    changed = []

    def interfere(done, total):
        if not changed:
            changed.append(True)
            change(target)

    with pytest.raises(ValueError, match=rf"source must not change while it is converted; .*{target.name} did") as info:
        convert_checkpoint(sharded_base, tmp_path / "out", link=link, progress=interfere)
    assert "Nothing was written" in str(info.value)
    assert only(tmp_path, "base")


def test_a_tokenizer_that_needs_code_is_refused_before_anything_is_copied(base, tmp_path):
    (base / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["own.Tokenizer", null]}}')
    copied = []
    with pytest.raises(ValueError, match="a tokenizer that needs no code of its own"):
        convert_checkpoint(base, tmp_path / "out", progress=lambda *bytes_done: copied.append(bytes_done))
    assert not copied
    assert only(tmp_path, "base")


def test_foreign_code_and_files_stay_behind(base, tmp_path):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "evil.Config"}}))
    (base / "evil.py").write_text("raise SystemExit")
    (base / "pytorch_model.bin").write_bytes(b"pickle")
    (base / "LICENSE").write_text("MIT")
    convert_checkpoint(base, tmp_path / "out")
    written = contents(tmp_path / "out")
    assert written.keys().isdisjoint({"evil.py", "pytorch_model.bin"})
    assert written["LICENSE"] == b"MIT"
    assert json.loads(written["config.json"])["auto_map"]["AutoConfig"] == "modeling_kromhc.KromHCLlamaConfig"


def test_the_card_of_a_local_base_names_no_path(base, tmp_path):
    convert_checkpoint(base, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert str(tmp_path) not in card
    assert "base_model:" not in card
    assert "## Verification" not in card
    assert AutoConfig.from_pretrained(tmp_path / "out").hc_conversion == {}


@pytest.mark.parametrize("weight_map", [{"a": 5}, {"a": None}, {}, ["a"]], ids=str)
def test_an_index_that_names_no_files_is_refused(tmp_path, weight_map):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="must have a weight_map with a file name for each tensor"):
        find_weights(tmp_path, {})
    with pytest.raises(ValueError, match="transformers_weights must name a file inside the checkpoint; got 5"):
        find_weights(tmp_path, {"transformers_weights": 5})
