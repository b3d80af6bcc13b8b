"""Conversion of large checkpoints, and of any checkpoint when something goes wrong half way."""

import errno
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.sparse import sparse_llama
from support.tiny import configurations, make_model, token_ids
from transformers import AutoConfig, AutoModelForCausalLM

from kromhc_hf import convert_checkpoint
from kromhc_hf.conversion.disk import LINKS, new_folder
from kromhc_hf.conversion.tensor_files import DTYPE_NAMES, TensorForm, write_safetensors


HERE = Path(__file__).parents[1] / "support"


@pytest.fixture
def base(tmp_path) -> Path:
    make_model(configurations("llama")[0]).save_pretrained(tmp_path / "base", max_shard_size="40KB")
    return tmp_path / "base"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def only(tmp_path: Path, *names: str) -> bool:
    return sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


MEASURE = """
import json, sys, time
import kromhc_hf
def kilobytes(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])
before, start = kilobytes("VmRSS"), time.process_time()
report = kromhc_hf.convert_checkpoint(sys.argv[1], sys.argv[2], link="hardlink", num_streams=int(sys.argv[3]))
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "megabytes": (kilobytes("VmHWM") - before) / 1024, **report.to_dict()}))
"""


@pytest.mark.parametrize("num_streams", [4, 16], ids="n{}".format)
def test_eight_gigabytes_in_forty_shards(tmp_path, num_streams):
    size = sparse_llama(tmp_path / "base")
    assert size > 8e9
    assert len(list((tmp_path / "base").glob("*.safetensors"))) == 40
    command = [sys.executable, "-c", MEASURE, tmp_path / "base", tmp_path / "out", str(num_streams)]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    assert report["base_tensors"] == 19 * 9 + 3
    # At n=16 the new tensors alone are 340 MB.
    assert report["added_bytes"] > {4: 24e6, 16: 340e6}[num_streams]
    assert report["megabytes"] < 150
    # Processor time: the clock on the wall also counts what else runs; benchmarks/conversion.py shows it.
    if num_streams == 4:
        assert report["seconds"] < 2
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 41
    with safe_open(tmp_path / "out/kromhc.safetensors", "pt") as file:
        assert file.get_tensor("model.layers.18.ffn_hc.alpha").tolist() == pytest.approx([0.01] * 3)


@pytest.mark.parametrize("link", LINKS)
def test_links(base, tmp_path, link):
    before = contents(base)
    steps = []
    report = convert_checkpoint(
        base, tmp_path / "out", link=link, verify=True, progress=lambda done, total: steps.append((done, total))
    )
    assert report.bitwise_equal
    shards = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        original = base / shard.name
        assert shard.read_bytes() == original.read_bytes()
        assert shard.is_symlink() == (link == "symlink")
        assert os.path.samefile(shard, original) == (link in ("hardlink", "symlink"))
    assert not (tmp_path / "out/generation_config.json").is_symlink()
    done, total = zip(*steps)
    assert list(done) == sorted(done)
    assert (
        done[-1]
        == total[-1]
        == sum(p.stat().st_size for p in base.iterdir() if p.suffix == ".safetensors")
        + sum((base / name).stat().st_size for name in ("generation_config.json",))
    )
    # What is trained and saved there does not reach the base.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model.save_pretrained(tmp_path / "out", max_shard_size="40KB")
    assert contents(base) == before


def test_links_out_of_a_cache_of_links(base, tmp_path):
    """The Hub's cache holds symbolic links to files that are named by their content."""
    (tmp_path / "snapshot").mkdir()
    for path in base.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    convert_checkpoint(tmp_path / "snapshot", tmp_path / "out", link="hardlink")
    for shard in (tmp_path / "out").glob("model-*.safetensors"):
        assert not shard.is_symlink()
        assert os.path.samefile(shard, base / shard.name)


def test_unknown_link(base, tmp_path):
    with pytest.raises(
        ValueError, match="link must be one of copy, hardlink, symlink, reflink-if-possible; got 'move'"
    ):
        convert_checkpoint(base, tmp_path / "out", link="move")
    assert only(tmp_path, "base")


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_hard_link_to_another_file_system(base, tmp_path):
    destination = Path("/dev/shm") / f"{tmp_path.name}-{os.getpid()}"
    with pytest.raises(OSError, match="on one file system .* Use link='symlink' or 'copy'"):
        convert_checkpoint(base, destination, link="hardlink")
    assert not list(destination.parent.glob(f"*{destination.name}*"))


def test_killed_at_fifty_moments(tmp_path):
    sparse_llama(
        tmp_path / "base",
        num_layers=4,
        shards=6,
        hidden_size=512,
        intermediate_size=1024,
        num_attention_heads=8,
        vocab_size=999,
    )
    (tmp_path / "home").mkdir()
    command = [sys.executable, HERE / "killed_conversions.py", tmp_path / "base", tmp_path / "home", "50"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    counts = json.loads(result.stdout.splitlines()[-1])
    assert counts["complete"] + counts["absent"] == 50
    assert counts["absent"] >= 10
    assert counts["leftovers"] >= 5
    assert counts["names"] == ["measured", "out-0", "out-1", "out-2", "whole"]


def test_leftovers_are_removed_and_others_are_not(base, tmp_path):
    (tmp_path / ".out.partial-0123abcd").mkdir()
    (tmp_path / ".out.partial-0123abcd/half").write_text("x")
    (tmp_path / ".out.partial-notes").mkdir()
    convert_checkpoint(base, tmp_path / "out")
    assert only(tmp_path, "base", "out", ".out.partial-notes")


def test_one_destination_is_made_once_at_a_time(base, tmp_path):
    busy = pytest.raises(FileExistsError, match="made by one process at a time; another one is writing")
    with new_folder(tmp_path / "out"), busy:
        convert_checkpoint(base, tmp_path / "out")
    taken = pytest.raises(FileExistsError, match="must not exist or be an empty folder; .*late is not empty")
    with taken, new_folder(tmp_path / "late") as folder:
        (folder / "mine").touch()
        (tmp_path / "late").mkdir()
        (tmp_path / "late/theirs").touch()
    assert [path.name for path in (tmp_path / "late").iterdir()] == ["theirs"]


@pytest.mark.parametrize("limit", [1, 2_000, 30_000], ids="{}-bytes".format)
def test_no_room(base, tmp_path, limit):
    """A limit on file sizes acts as a full disk does: a write fails half way."""
    before = contents(base)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(
            OSError, match="must have room for the checkpoint; .* nothing was left behind. Free some space"
        ) as info:
            convert_checkpoint(base, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert info.value.errno == errno.EFBIG
    assert only(tmp_path, "base")
    assert contents(base) == before


def test_too_little_room_is_seen_before_anything_is_copied(base, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    steps = []
    with pytest.raises(OSError, match=r"must have room for \d+,\d+ bytes; .* has 100,000. Free some space"):
        convert_checkpoint(base, tmp_path / "out", progress=lambda *step: steps.append(step))
    assert steps == []
    assert only(tmp_path, "base")
    convert_checkpoint(base, tmp_path / "out", link="hardlink")


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 192 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", folder], capture_output=True, text=True)
    if mount.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(base, full_disk, monkeypatch):
    before = contents(base)
    with pytest.raises(OSError, match="must have room for"):
        convert_checkpoint(base, full_disk / "out")
    # As if somebody else filled it after the check.
    real = shutil.disk_usage(full_disk)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=10**12))
    with pytest.raises(OSError, match="nothing was left behind") as info:
        convert_checkpoint(base, full_disk / "out")
    assert info.value.errno == errno.ENOSPC
    assert list(full_disk.iterdir()) == []
    assert contents(base) == before


@pytest.mark.parametrize("parent", ["/proc", "/sys/kernel"])
def test_a_destination_that_cannot_be_written(base, parent):
    if not Path(parent).is_dir():
        pytest.skip(f"no {parent} here")
    with pytest.raises(OSError, match=rf"must be in a folder that can be written to; making {parent}/out failed"):
        convert_checkpoint(base, f"{parent}/out")


def test_a_read_only_destination(base, tmp_path, full_disk):
    subprocess.run(["mount", "-o", "remount,ro", full_disk], check=True)
    with pytest.raises(OSError, match="must be in a folder that can be written to; .*Read-only") as info:
        convert_checkpoint(base, full_disk / "out")
    assert info.value.errno == errno.EROFS


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
def test_a_source_that_changes(base, tmp_path, link, name, change):
    (target,) = base.glob(name.replace("00004", "*"))
    changed = []

    def interfere(done, total):
        if not changed:
            changed.append(True)
            change(target)

    with pytest.raises(ValueError, match=rf"source must not change while it is converted; .*{target.name} did") as info:
        convert_checkpoint(base, tmp_path / "out", link=link, progress=interfere)
    assert "Nothing was written" in str(info.value)
    assert only(tmp_path, "base")


PICKLED = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("dtype", PICKLED)
@pytest.mark.parametrize("kind", ["single", "sharded", "legacy"])
def test_pickled_bases(tmp_path, kind, dtype):
    model = make_model(configurations("gpt_neox")[0], PICKLED[dtype])
    base = tmp_path / "base"
    model.config.save_pretrained(base)
    state = {**model.state_dict(), "steps": torch.tensor(7), "flags": torch.tensor([True, False, True])}
    if kind == "sharded":
        names = list(state)
        shards = {f"pytorch_model-0000{i + 1}-of-00003.bin": names[i::3] for i in range(3)}
        for file, held in shards.items():
            torch.save({name: state[name] for name in held}, base / file)
        weight_map = {name: file for file, held in shards.items() for name in held}
        (base / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    else:
        torch.save(state, base / "pytorch_model.bin", _use_new_zipfile_serialization=kind != "legacy")
    before = contents(base)
    report = convert_checkpoint(base, tmp_path / "out", verify=True, link="hardlink")
    assert report.bitwise_equal
    assert report.base_tensors == len(state)
    assert contents(base) == before
    written = list((tmp_path / "out").glob("model*.safetensors"))
    assert len(written) == (3 if kind == "sharded" else 1)
    assert not list((tmp_path / "out").glob("*.bin"))
    loaded = {name: tensor for path in written for name, tensor in load_file(path).items()}
    assert loaded.keys() == state.keys()
    assert all(loaded[name].dtype == state[name].dtype and torch.equal(loaded[name], state[name]) for name in state)
    tokens = token_ids(model.config)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert torch.equal(converted(tokens).logits, model(tokens).logits)


def test_tied_weights_in_a_pickled_base(tmp_path):
    config = configurations("llama")[0]
    config.tie_word_embeddings = True
    model = make_model(config)
    config.save_pretrained(tmp_path / "base")
    torch.save(model.state_dict(), tmp_path / "base/pytorch_model.bin")
    assert convert_checkpoint(tmp_path / "base", tmp_path / "out", verify=True).bitwise_equal


class Evil:
    def __init__(self, trace: str):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize("protocol", ["zip", "legacy", "plain"])
def test_a_pickle_that_runs_code_is_refused(base, tmp_path, protocol):
    for path in base.glob("model*"):
        path.unlink()
    content = {"model.norm.weight": torch.zeros(32), "evil": Evil(str(tmp_path / "ran"))}
    if protocol == "plain":
        (base / "pytorch_model.bin").write_bytes(pickle.dumps(content["evil"]))
    else:
        torch.save(content, base / "pytorch_model.bin", _use_new_zipfile_serialization=protocol == "zip")
    with pytest.raises(
        ValueError, match="pytorch_model.bin must be a complete file of torch.save that holds tensors alone"
    ):
        convert_checkpoint(base, tmp_path / "out")
    assert only(tmp_path, "base")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"a": torch.zeros(1)}}, "must hold a dictionary of tensors; got dict under 'state_dict'"),
        ([torch.zeros(1)], "must hold a dictionary of tensors; got list"),
        (
            {"a": torch.zeros(1, dtype=torch.complex64)},
            "a must have a dtype that safetensors knows; got torch.complex64",
        ),
    ],
    ids=["nested", "list", "complex"],
)
def test_other_things_in_a_pickle(base, tmp_path, content, message):
    for path in base.glob("model*"):
        path.unlink()
    torch.save(content, base / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(base, tmp_path / "out")
    assert only(tmp_path, "base")


def test_damaged_pickles_are_named(base, tmp_path):
    for path in base.glob("model*"):
        path.unlink()
    shard = base / "pytorch_model-00001-of-00001.bin"
    torch.save({"a": torch.zeros(1000)}, shard)
    index = base / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard.name, "b": shard.name}}))
    with pytest.raises(ValueError, match=rf"{shard.name} must hold 'b' according to {index.name}"):
        convert_checkpoint(base, tmp_path / "out")
    index.write_text(json.dumps({"weight_map": {"a": shard.name}}))
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(ValueError, match=rf"{shard.name} must be a complete file of torch.save"):
        convert_checkpoint(base, tmp_path / "out")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"names the file '{shard.name}'"):
        convert_checkpoint(base, tmp_path / "out")
    assert only(tmp_path, "base")


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


def test_the_card_of_a_local_base_names_no_path(base, tmp_path):
    convert_checkpoint(base, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert str(tmp_path) not in card
    assert "base_model:" not in card
    assert "## Verification" not in card
    assert AutoConfig.from_pretrained(tmp_path / "out").hc_conversion == {}


def test_writer_agrees_with_safetensors(tmp_path):
    tensors = {
        f"{name}-{shape}": torch.randint(0, 2, shape).to(dtype)
        for dtype, name in DTYPE_NAMES.items()
        for shape in ((), (0,), (3,), (2, 3))
    }
    write_safetensors(tmp_path / "file", {n: TensorForm.of(t) for n, t in tensors.items()}, tensors.items(), {"a": "b"})
    loaded = load_file(tmp_path / "file")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(
            loaded[name].view(torch.uint8) if tensor.dim() else loaded[name].double(),
            tensor.view(torch.uint8) if tensor.dim() else tensor.double(),
        )
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == {"format": "pt", "a": "b"}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.zeros(3)}, "a must be the next tensor"),
        ({"a": torch.zeros(2), "c": torch.zeros(1)}, "c must be the next tensor"),
        ({"a": torch.zeros(2)}, "b did not come"),
        ({"a": torch.zeros(2), "b": torch.zeros(1), "c": torch.zeros(1)}, "c must be the next tensor"),
    ],
    ids=["other-shape", "other-name", "too-few", "too-many"],
)
def test_writer_keeps_to_its_header(tmp_path, tensors, message):
    forms = {"a": TensorForm(torch.float32, (2,)), "b": TensorForm(torch.float32, (1,))}
    with pytest.raises(ValueError, match=message):
        write_safetensors(tmp_path / "file", forms, tensors.items())
