"""Checkpoints on disk: what conversion writes, that it proves itself, and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support.tiny import configurations, make_model, token_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

from kromhc_hf import convert_checkpoint, verify_conversion
from kromhc_hf.conversion.disk import new_folder


REAL = ("stories15M", "stories260K", "gpt2-tinystories-1M", "gpt-nano-sort")


@pytest.fixture
def base(tmp_path) -> Path:
    make_model(configurations("llama")[0]).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("num_streams", [2, 4, 8], ids="n{}".format)
@pytest.mark.parametrize("name", REAL)
def test_real_checkpoints(shared, tmp_path, name, num_streams):
    source = shared / "models" / name
    before = contents(source)
    report = convert_checkpoint(source, tmp_path / "out", num_streams=num_streams, verify=True)
    assert contents(source) == before
    assert report.lossless
    assert report.bitwise_equal
    assert report.max_logit_difference == report.mean_kl == 0
    assert report.top1_agreement == 1
    assert report.greedy_base == report.greedy_converted
    assert report.text == (name != "gpt-nano-sort")
    written = contents(tmp_path / "out")
    assert written["model.safetensors"] == before["model.safetensors"]
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= written.keys()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(info.values())
    added = {name: p for name, p in model.named_parameters() if "_hc." in name}
    assert report.added_parameters == sum(p.numel() for p in added.values())
    assert report.added_bytes == 4 * report.added_parameters
    assert {p.dtype for p in added.values()} == {torch.float32}
    with safe_open(source / "model.safetensors", "pt") as file:
        assert set(file.keys()) <= set(model.state_dict())
        assert report.base_tensors == len(list(file.keys()))


def test_tokenizer_comes_along(shared, tmp_path):
    convert_checkpoint(shared / "models/stories15M", tmp_path / "out")
    text = "Once upon a time, in a house by the sea"
    first, second = (AutoTokenizer.from_pretrained(f) for f in (shared / "models/stories15M", tmp_path / "out"))
    assert type(first) is type(second)
    assert first(text) == second(text)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_neox", "gpt2"])
def test_sharded_base(tmp_path, family):
    model = make_model(configurations(family)[0], torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    before = contents(tmp_path / "base")
    report = convert_checkpoint(tmp_path / "base", tmp_path / "out", num_streams=6, verify=True)
    assert report.bitwise_equal
    assert not report.text
    written = contents(tmp_path / "out")
    shards = [name for name in before if name.endswith(".safetensors")]
    assert len(shards) > 2
    assert all(written[name] == before[name] for name in shards)
    index = json.loads(written["model.safetensors.index.json"])
    old = json.loads(before["model.safetensors.index.json"])
    assert old["weight_map"].items() < index["weight_map"].items()
    assert "transformers_weights" not in json.loads(written["config.json"])
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    tokens = token_ids(model.config)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_saving_trained_weights_into_the_same_folder(base, tmp_path):
    """What was trained wins over the file that the conversion wrote."""
    convert_checkpoint(base, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        model.model.layers[0].attn_hc.bias.fill_(0.5)
    model.save_pretrained(tmp_path / "out")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert (again.model.layers[0].attn_hc.bias == 0.5).all()


@pytest.mark.parametrize("variant", ["hc", "mhc", "mhc_lite", "tbp", "identity"])
def test_other_variants_and_learned_ends(base, tmp_path, variant):
    report = convert_checkpoint(
        base, tmp_path / "out", variant=variant, readout="softmax", stream_embedding=True, verify=True
    )
    assert report.bitwise_equal
    assert report.variant == variant
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert {"expand_hc", "readout_hc"} <= {name.rpartition(".")[2] for name, _ in model.named_modules()}


def test_paper_init_is_reported_as_different(base, tmp_path):
    report = convert_checkpoint(base, tmp_path / "out", init="paper", readout="sum", verify=True)
    assert not report.lossless_init
    assert not report.lossless
    assert report.max_logit_difference > 0.01 * report.max_logit
    assert report.mean_kl > 1e-5
    assert report.passed


def test_a_broken_promise_is_seen(base, tmp_path):
    convert_checkpoint(base, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        model.model.layers[1].ffn_hc.bias[5] += 0.01  # a write weight
    model.save_pretrained(tmp_path / "changed")
    report = verify_conversion(base, tmp_path / "changed")
    assert report.lossless_init
    assert not report.lossless
    assert not report.bitwise_equal
    assert not report.passed
    assert 0 < report.max_logit_difference < report.max_logit


def test_half_precision_must_be_bitwise(base, tmp_path):
    """A difference of one bf16 rounding in one logit fails, although it is far below what fp32 may differ by."""
    convert_checkpoint(base, tmp_path / "out")
    assert verify_conversion(base, tmp_path / "out", dtype="bfloat16").bitwise_equal
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight[5] *= 1 + 2**-7
    model.save_pretrained(tmp_path / "changed")
    assert not verify_conversion(base, tmp_path / "changed", dtype="bfloat16").lossless


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "must hold safetensors weights"),
        (lambda f: truncate(f / "model.safetensors"), ValueError, "must be a complete safetensors file"),
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "has no config.json"),
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


@pytest.mark.parametrize("num_streams", [0, -1, 7, "4"])
def test_bad_options_leave_nothing(base, tmp_path, num_streams):
    with pytest.raises(ValueError, match="num_streams must"):
        convert_checkpoint(base, tmp_path / "out", num_streams=num_streams)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_destination_in_use_is_not_touched(base, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="out is not empty. Choose another destination"):
        convert_checkpoint(base, tmp_path / "out")
    assert contents(tmp_path / "out") == {"thesis.txt": b"years of work"}
    (tmp_path / "empty").mkdir()
    convert_checkpoint(base, tmp_path / "empty")
    assert (tmp_path / "empty/config.json").is_file()


def test_a_converted_source_is_refused(base, tmp_path):
    convert_checkpoint(base, tmp_path / "out")
    with pytest.raises(ValueError, match="has been converted already .* Convert its base model instead"):
        convert_checkpoint(tmp_path / "out", tmp_path / "twice")


def test_a_source_that_is_nowhere(tmp_path):
    with pytest.raises(FileNotFoundError, match="source must be an existing folder or a Hub id .*no/such"):
        convert_checkpoint("no/such", tmp_path / "out")


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


def test_a_failure_half_way_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_killed_conversion_leaves_nothing_that_stays(base, tmp_path):
    script = (
        "import sys, time, kromhc_hf;kromhc_hf.convert_checkpoint(*sys.argv[1:3], progress=lambda *_: time.sleep(60))"
    )
    process = subprocess.Popen([sys.executable, "-c", script, base, tmp_path / "out"])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.partial-*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    convert_checkpoint(base, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_reads_from_a_read_only_source(base, tmp_path):
    shutil.copytree(base, tmp_path / "copy")
    for path in base.iterdir():
        os.chmod(path, 0o444)
    convert_checkpoint(base, tmp_path / "out")
    assert contents(base) == contents(tmp_path / "copy")
