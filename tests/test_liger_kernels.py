"""Liger's table of model types knows ours, whichever is imported first; Liger itself runs in `make clients`."""

import subprocess
import sys
from pathlib import Path

import pytest


PROJECT = Path(__file__).resolve().parents[1]
# Stands for the module of Liger: functions by model type, one of them of a family that is not ours.
FUNCTIONS = "{'llama': print, 'qwen2_vl': repr, 'bert': id, 'kromhc_gemma': len, 'gemma': sum}"
CHECK = """
from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as functions
assert functions["kromhc_llama"] is print
assert functions["kromhc_qwen2_vl"] is repr
assert functions["kromhc_gemma"] is len  # one of its own is left alone
assert set(functions) == {"llama", "qwen2_vl", "bert", "gemma", "kromhc_llama", "kromhc_qwen2_vl", "kromhc_gemma"}
"""


@pytest.mark.parametrize("first", ["kromhc_hf", "liger_kernel.transformers.monkey_patch", "liger_kernel"])
def test_families_are_known_to_liger(tmp_path, first):
    package = tmp_path / "liger_kernel" / "transformers"
    package.mkdir(parents=True)
    (package / "monkey_patch.py").write_text(f"MODEL_TYPE_TO_APPLY_LIGER_FN = {FUNCTIONS}")
    (package / "__init__.py").touch()
    (tmp_path / "liger_kernel" / "__init__.py").touch()
    code = f"import sys, {first}, kromhc_hf\nassert {first != 'kromhc_hf'} == ('liger_kernel' in sys.modules)\n{CHECK}"
    environment = {"PYTHONPATH": f"{tmp_path}:{PROJECT}", "HF_HUB_OFFLINE": "1", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
