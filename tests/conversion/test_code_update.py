"""Folders of saved models whose code files are brought up to date."""

import json
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.connected import assert_as_right, connected
from support.remote import visit_without_kromhc
from transformers import AutoModelForCausalLM

from kromhc_hf import update_code
from kromhc_hf.modeling.remote_code import MARKER, code_files


FIRST_VERSION = Path(__file__).parents[1] / "data" / "first_version.tar.xz"


@pytest.fixture
def folder(tmp_path) -> Path:
    connected(0.3).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_up_to_date_stays(folder):
    before = contents(folder)
    assert update_code(folder) == []
    assert contents(folder) == before


def test_code_of_another_version_is_replaced(folder):
    before = contents(folder)
    (folder / "host.py").write_text(f"{MARKER}\nraise ImportError\n")
    (folder / "patching.py").write_text(f"{MARKER}\n")
    (folder / "variants.py").unlink()
    (folder / "notes.py").write_text("# mine\n")
    assert update_code(folder) == ["host.py", "patching.py", "variants.py"]
    assert contents(folder) == {**before, "notes.py": b"# mine\n"}


def test_the_first_version_loads_without_the_package_by_the_new_code(tmp_path):
    with tarfile.open(FIRST_VERSION) as archive:
        archive.extractall(tmp_path, filter="data")
    folder, expected = tmp_path / "saved", load_file(tmp_path / "expected.safetensors")["saved"]
    weights = {name: content for name, content in contents(folder).items() if "safetensors" in name}
    assert "config.json" in update_code(folder)
    assert update_code(folder) == []
    assert weights.items() <= contents(folder).items()
    assert all((folder / file.name).read_bytes() == file.read_bytes() for file in code_files())
    names = json.loads((folder / "config.json").read_text())["auto_map"].values()
    assert {name.partition(".")[0] for name in names} == {"modeling_kromhc"}
    report = visit_without_kromhc(tmp_path, {str(folder): tmp_path / "again"})[str(folder)]
    assert (report["loading"], report["reloaded_equal"]) == ([], True)
    assert_as_right(AutoModelForCausalLM.from_pretrained(folder), torch.arange(2, 14).view(1, -1), expected)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "host.py").write_text("# mine\n"), r"got host.py. Move them"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "must start with 'kromhc_'"),
        (
            lambda folder: (folder / "config.json").write_text(
                '{"model_type": "kromhc_llama", "auto_map": {"AutoConfig": "other/repo--modeling.Config"}}'
            ),
            "must name classes of kromhc_hf alone",
        ),
    ],
    ids=["file-in-the-way", "plain-model", "foreign-code"],
)
def test_refusals_change_nothing(folder, spoil, message):
    (folder / "variants.py").unlink()
    spoil(folder)
    before = contents(folder)
    with pytest.raises(ValueError, match=message):
        update_code(folder)
    assert contents(folder) == before


def test_a_folder_without_configuration(tmp_path):
    with pytest.raises(OSError, match=r"config.json"):
        update_code(tmp_path)
