"""Destinations that exist, are links or are killed while they are filled, and systems without file locks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.folders import only
from support.forked import exit_code, fork
from transformers import AutoModelForCausalLM

from kromhc_hf import convert_checkpoint
from kromhc_hf.conversion.disk import LINKS


@pytest.mark.parametrize("spelled", [".", "./", "../here", "link", "link/", "chain"])
def test_an_empty_folder_is_filled_where_it_is(base, tmp_path, monkeypatch, spelled):
    here = tmp_path / "here"
    here.mkdir(mode=0o750)
    (here.parent / "link").symlink_to("here")
    (here.parent / "chain").symlink_to("link")
    before = here.stat()
    monkeypatch.chdir(here if spelled.startswith(".") else tmp_path)
    assert convert_checkpoint(base, spelled, verify=True).bitwise_equal
    assert (here.stat().st_ino, here.stat().st_mode) == (before.st_ino, before.st_mode)
    assert "# here" in (here / "README.md").read_text()
    assert only(tmp_path, "base", "here", "link", "chain")
    assert not list(here.glob(".*"))
    assert (tmp_path / "link").is_symlink()
    AutoModelForCausalLM.from_pretrained(here)


def test_destinations_that_are_no_folder(base, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "to-file").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, what in (("file", "is a file"), ("to-file", "is a file"), ("dangling", "is a link to .*nowhere, which")):
        with pytest.raises(FileExistsError, match=f"must not exist or be an empty folder; .*{name} {what}"):
            convert_checkpoint(base, tmp_path / name)
    with pytest.raises(OSError, match="destination must be in a folder that can be written to; .*file/out failed"):
        convert_checkpoint(base, tmp_path / "file/out")
    assert only(tmp_path, "base", "file", "to-file", "dangling")


def test_a_folder_with_leftovers_alone_is_empty(base, tmp_path):
    (tmp_path / "out/.out.partial-0123abcd").mkdir(parents=True)
    convert_checkpoint(base, tmp_path / "out")
    assert not list((tmp_path / "out").glob(".out.partial-*"))


@pytest.mark.parametrize("moves", [0, 1, 5])
def test_killed_while_it_fills_a_folder(base, tmp_path, moves):
    """No config.json is there before everything is, and the next conversion takes back what was moved."""
    (tmp_path / "out").mkdir()
    rename, done = Path.rename, []

    def counted(self, target):
        done.append(target)
        return os._exit(9) if len(done) > moves else rename(self, target)

    def convert():
        Path.rename = counted
        convert_checkpoint(base, tmp_path / "out")

    assert exit_code(fork(convert)) == 9
    (partial,) = (tmp_path / "out").glob(".out.partial-*")
    assert len(list((tmp_path / "out").iterdir())) == moves + 1
    assert not (tmp_path / "out/config.json").exists()
    convert_checkpoint(base, tmp_path / "out")
    assert not partial.exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("link", LINKS)
def test_without_file_locks(base, tmp_path, monkeypatch, link):
    """As on Windows, where what a dead process left behind cannot be told from what a live one is writing."""
    monkeypatch.setattr("kromhc_hf.conversion.disk.fcntl", None)
    (tmp_path / ".out.partial-0123abcd").mkdir()
    assert convert_checkpoint(base, tmp_path / "out", link=link, verify=True).bitwise_equal
    assert only(tmp_path, "base", "out", ".out.partial-0123abcd")
    with pytest.raises(FileExistsError, match="is not empty"):
        convert_checkpoint(base, tmp_path / "out")


def test_the_package_needs_no_fcntl(base, tmp_path):
    script = (
        "import sys, torch, transformers; sys.modules['fcntl'] = None\n"
        "import kromhc_hf; kromhc_hf.convert_checkpoint(*sys.argv[1:3])"
    )
    subprocess.run([sys.executable, "-c", script, base, tmp_path / "out"], check=True)
    assert only(tmp_path, "base", "out")
