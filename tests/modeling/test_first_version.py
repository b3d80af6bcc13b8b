"""What the version before this layout saved loads as it did, with the package and without it.

`tests/data/first_version.tar.xz` was written by that version: a base, a fresh conversion, a trained model with many
options, an adapter, hyper-connections alone, and the logits of all four.
"""

import json
import tarfile
import warnings
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from support.connected import assert_as_right
from support.remote import visit_without_kromhc
from transformers import AutoModelForCausalLM

from kromhc_hf import KromHCForCausalLM, load_hyper_connections
from kromhc_hf.modeling.remote_code import MARKER, code_files


ARCHIVE = Path(__file__).parents[1] / "data" / "first_version.tar.xz"
IDS = torch.arange(2, 14).view(1, -1)


@pytest.fixture
def saved(tmp_path, monkeypatch) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    # The adapter and the hyper-connections name their base by a relative path.
    monkeypatch.chdir(tmp_path)
    return tmp_path


LOADERS = {
    "converted": AutoModelForCausalLM.from_pretrained,
    "saved": KromHCForCausalLM.from_pretrained,
    "adapter": AutoPeftModelForCausalLM.from_pretrained,
    "connections": load_hyper_connections,
}


@pytest.mark.parametrize("name", LOADERS)
def test_loads_with_the_package(saved, name):
    model, expected = LOADERS[name](saved / name), load_file(saved / "expected.safetensors")[name]
    if name == "converted":
        assert torch.equal(model.eval()(IDS).logits, expected)
    assert_as_right(model, IDS, expected)


def test_loads_without_the_package(saved):
    names = ("converted", "saved")
    reports = visit_without_kromhc(saved, {str(saved / name): saved / "again" / name for name in names})
    for name in names:
        report = reports[str(saved / name)]
        assert not report["installed"]
        assert report["loading"] == []
        assert report["reloaded_equal"]
        # The old code saved it again, and the new code reads that.
        again = AutoModelForCausalLM.from_pretrained(saved / "again" / name)
        assert isinstance(again, KromHCForCausalLM)


def test_a_file_of_the_user_in_its_folder_is_kept(saved):
    model = AutoModelForCausalLM.from_pretrained(saved / "saved")
    (saved / "saved/options.py").write_text("# a week of my work\n")
    with pytest.warns(UserWarning, match=r"\(options.py\)"):
        model.save_pretrained(saved / "saved")
    assert (saved / "saved/options.py").read_text() == "# a week of my work\n"


def test_saving_into_its_folder_brings_the_code_up_to_date(saved):
    model = AutoModelForCausalLM.from_pretrained(saved / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(saved / "saved")
    for path in code_files():
        assert (saved / "saved" / path.name).read_text().startswith(MARKER)
    names = json.loads((saved / "saved" / "config.json").read_text())["auto_map"].values()
    assert {name.partition(".")[0] for name in names} == {"modeling_kromhc"}
    report = visit_without_kromhc(saved, {str(saved / "saved"): saved / "again"})[str(saved / "saved")]
    assert report["loading"] == []
