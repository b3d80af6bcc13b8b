"""`kromhc doctor`: versions, the kernel that would run, tools that are there, and the support of a model."""

import json
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch
from clients.run import clients, summary
from support.tiny import configurations, make_model

from kromhc_hf import doctor
from kromhc_hf.modeling import kernels


TESTS = Path(__file__).resolve().parent


def test_what_is_known_of_tools_is_what_was_run():
    results = json.loads((TESTS.parent / "docs" / "works-with.json").read_text(encoding="utf-8"))
    assert json.loads(doctor.TOOLS.read_text(encoding="utf-8")) == summary(results, clients())


def test_doctor_names_what_is_there(kromhc, monkeypatch, tmp_path):
    tools = [{"tool": "A tool", "package": "torch", "use": "Use it.", "outcome": "works", "date": "2026-01-01"}]
    tools.append({**tools[0], "tool": "Another", "package": "not-installed-at-all"})
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    monkeypatch.setattr(doctor, "TOOLS", tmp_path / "tools.json")
    make_model(configurations("llama")[0]).save_pretrained(tmp_path / "base")
    code, out, _ = kromhc("doctor", tmp_path / "base", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["versions"]["torch"] == torch.__version__
    assert [tool["tool"] for tool in found["tools"]] == ["A tool"]
    assert found["tools"][0]["installed"] == torch.__version__
    assert (found["model"]["model_type"], found["model"]["supported"]) == ("llama", True)
    assert found["kernel"]["runs"] == ("triton" if torch.cuda.is_available() else "torch")
    code, out, _ = kromhc("doctor")
    assert code == 0
    assert all(text in out for text in ("A tool", "works. Use it.", "transformers", "kernel"))
    tools[0]["use"] = f"convert(argument='{'long' * 100}')"
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    _, out, _ = kromhc("doctor")
    assert "".join(out.split()).count("long") == 100
    assert json.loads(kromhc("doctor", "llama", "--json")[1])["model"]["supported"]
    code, out, err = kromhc("doctor", tmp_path / "nothing")
    assert (code, out) == (2, "")
    assert "nothing" in err


@pytest.mark.parametrize(
    ("obstacle", "fault", "expected"),
    [
        ("needs the package triton, which is not installed", None, ("torch", "Triton needs the package triton")),
        (None, "wrong", ("torch", "a check of the Triton kernels failed: wrong")),
        (None, None, ("triton", "it agreed with plain PyTorch in a check")),
    ],
)
def test_why_a_kernel_runs(monkeypatch, obstacle, fault, expected):
    for name, answer in (("_obstacle", obstacle), ("fault", fault)):
        monkeypatch.setattr(kernels, name, create_autospec(getattr(kernels, name), return_value=answer))
    kernel, reason = kernels.chosen(torch.device("cuda"), torch.bfloat16, 4, 64, "kromhc")
    assert (kernel, reason[: len(expected[1])]) == expected
    assert kernels.chosen(torch.device("cpu"), torch.bfloat16, 4, 64, "kromhc")[0] == "torch"
