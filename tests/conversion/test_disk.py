"""Folders that appear whole or not at all: links, full disks, leftovers, killed conversions."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.folders import contents, only
from support.forked import exit_code, fork
from support.sparse import sparse_llama
from transformers import AutoModelForCausalLM

from kromhc_hf import convert_checkpoint
from kromhc_hf.conversion.disk import LINKS, new_folder


HERE = Path(__file__).parents[1] / "support"


@pytest.mark.parametrize("link", LINKS)
def test_links(sharded_base, tmp_path, link):
    before = contents(sharded_base)
    steps = []
    report = convert_checkpoint(
        sharded_base, tmp_path / "out", link=link, verify=True, progress=lambda done, total: steps.append((done, total))
    )
    assert report.bitwise_equal
    originals = sorted(sharded_base.glob("model-*.safetensors"))
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) - 1 == len(originals) > 2
    for shard, original in zip(shards, originals):
        assert shard.read_bytes() == original.read_bytes()
        assert shard.is_symlink() == (link == "symlink")
        assert os.path.samefile(shard, original) == (link in ("hardlink", "symlink"))
    assert not (tmp_path / "out/generation_config.json").is_symlink()
    done, total = zip(*steps)
    assert list(done) == sorted(done)
    assert (
        done[-1]
        == total[-1]
        == sum(p.stat().st_size for p in sharded_base.iterdir() if p.suffix == ".safetensors")
        + sum((sharded_base / name).stat().st_size for name in ("generation_config.json",))
    )
    # What is trained and saved there does not reach the base.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model.save_pretrained(tmp_path / "out", max_shard_size="40KB")
    assert contents(sharded_base) == before


def test_links_out_of_a_cache_of_links(sharded_base, tmp_path):
    """The Hub's cache holds symbolic links to files that are named by their content."""
    (tmp_path / "snapshot").mkdir()
    for path in sharded_base.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    convert_checkpoint(tmp_path / "snapshot", tmp_path / "out", link="hardlink")
    originals = sorted(sharded_base.glob("model-*.safetensors"))
    for shard, original in zip(sorted((tmp_path / "out").glob("model-*.safetensors")), originals):
        assert not shard.is_symlink()
        assert os.path.samefile(shard, original)


def test_unknown_link(sharded_base, tmp_path):
    with pytest.raises(
        ValueError, match="link must be one of copy, hardlink, symlink, reflink-if-possible; got 'move'"
    ):
        convert_checkpoint(sharded_base, tmp_path / "out", link="move")
    assert only(tmp_path, "base")


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_hard_link_to_another_file_system(sharded_base, tmp_path):
    destination = Path("/dev/shm") / f"{tmp_path.name}-{os.getpid()}"
    with pytest.raises(OSError, match="on one file system .* Use link='symlink' or 'copy'"):
        convert_checkpoint(sharded_base, destination, link="hardlink")
    assert not list(destination.parent.glob(f"*{destination.name}*"))


def test_a_destination_in_use_is_not_touched(base, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="out is not empty. Choose another destination"):
        convert_checkpoint(base, tmp_path / "out")
    assert contents(tmp_path / "out") == {"thesis.txt": b"years of work"}
    (tmp_path / "empty").mkdir()
    convert_checkpoint(base, tmp_path / "empty")
    assert (tmp_path / "empty/config.json").is_file()


def test_a_failure_half_way_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_killed_conversion_leaves_nothing_that_stays(base, tmp_path):
    child = fork(lambda: convert_checkpoint(base, tmp_path / "out", progress=lambda *_: time.sleep(60)))
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.partial-*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    assert exit_code(child) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    convert_checkpoint(base, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


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


def test_leftovers_are_removed_and_others_are_not(sharded_base, tmp_path):
    (tmp_path / ".out.partial-0123abcd").mkdir()
    (tmp_path / ".out.partial-0123abcd/half").write_text("x")
    (tmp_path / ".out.partial-notes").mkdir()
    convert_checkpoint(sharded_base, tmp_path / "out")
    assert only(tmp_path, "base", "out", ".out.partial-notes")


def test_one_destination_is_made_once_at_a_time(sharded_base, tmp_path):
    busy = pytest.raises(FileExistsError, match="made by one process at a time; another one is writing")
    with new_folder(tmp_path / "out"), busy:
        convert_checkpoint(sharded_base, tmp_path / "out")
    taken = pytest.raises(FileExistsError, match="must not exist or be an empty folder; .*late is not empty")
    with taken, new_folder(tmp_path / "late") as folder:
        (folder / "mine").touch()
        (tmp_path / "late").mkdir()
        (tmp_path / "late/theirs").touch()
    assert [path.name for path in (tmp_path / "late").iterdir()] == ["theirs"]


@pytest.mark.parametrize("limit", [1, 2_000, 30_000], ids="{}-bytes".format)
def test_no_room(sharded_base, tmp_path, limit):
    """A limit on file sizes acts as a full disk does: a write fails half way."""
    before = contents(sharded_base)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(
            OSError, match="must have room for the checkpoint; .* nothing was left behind. Free some space"
        ) as info:
            convert_checkpoint(sharded_base, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert info.value.errno == errno.EFBIG
    assert only(tmp_path, "base")
    assert contents(sharded_base) == before


def test_too_little_room_is_seen_before_anything_is_copied(sharded_base, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    steps = []
    with pytest.raises(OSError, match=r"must have room for \d+,\d+ bytes; .* has 100,000. Free some space"):
        convert_checkpoint(sharded_base, tmp_path / "out", progress=lambda *step: steps.append(step))
    assert steps == []
    assert only(tmp_path, "base")
    convert_checkpoint(sharded_base, tmp_path / "out", link="hardlink")


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


def test_a_full_disk(sharded_base, full_disk, monkeypatch):
    before = contents(sharded_base)
    with pytest.raises(OSError, match="must have room for"):
        convert_checkpoint(sharded_base, full_disk / "out")
    # As if somebody else filled it after the check.
    real = shutil.disk_usage(full_disk)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=10**12))
    with pytest.raises(OSError, match="nothing was left behind") as info:
        convert_checkpoint(sharded_base, full_disk / "out")
    assert info.value.errno == errno.ENOSPC
    assert list(full_disk.iterdir()) == []
    assert contents(sharded_base) == before


@pytest.mark.parametrize("parent", ["/proc", "/sys/kernel"])
def test_a_destination_that_cannot_be_written(sharded_base, parent):
    if not Path(parent).is_dir():
        pytest.skip(f"no {parent} here")
    with pytest.raises(OSError, match=rf"must be in a folder that can be written to; making {parent}/out failed"):
        convert_checkpoint(sharded_base, f"{parent}/out")


def test_a_read_only_destination(sharded_base, tmp_path, full_disk):
    subprocess.run(["mount", "-o", "remount,ro", full_disk], check=True)
    with pytest.raises(OSError, match="must be in a folder that can be written to; .*Read-only") as info:
        convert_checkpoint(sharded_base, full_disk / "out")
    assert info.value.errno == errno.EROFS
