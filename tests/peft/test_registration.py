"""What peft is told: the method, whichever package comes first, and default targets; and all without peft."""

import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.adapters import adapter_config, base_model, lora_config, perturb
from support.runs import retrofitted
from support.tiny import token_ids
from transformers import AutoModelForCausalLM

from kromhc_hf import supported_model_types


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("first", ["kromhc_hf", "peft"])
def test_the_method_is_known_whichever_package_comes_first(first):
    imports = {"kromhc_hf": "from kromhc_hf import KromHCPeftConfig", "peft": "import peft"}
    lines = [imports.pop(first), *imports.values(), "from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING"]
    lines.append("print(KromHCPeftConfig().peft_type in PEFT_TYPE_TO_TUNER_MAPPING)")
    result = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "True"


@pytest.mark.parametrize("module", ["config", "layer", "tuner"])
def test_every_module_may_be_the_first_that_is_imported(module):
    """As where a configuration is unpickled in another process, which imports its module and nothing in front of it."""
    known = "from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING; print(*PEFT_TYPE_TO_TUNER_MAPPING)"
    result = run_python(f"import kromhc_hf.peft.{module}; {known}")
    assert result.returncode == 0, result.stderr
    assert "PeftType.KROMHC" in result.stdout.split()


def test_a_fresh_process_loads_all_three_kinds_of_files(tmp_path):
    """LoRA with modules_to_save, hyper-connections as an adapter, and these stacked on LoRA."""
    base_model().save_pretrained(tmp_path / "base")
    retrofitted().save_pretrained(tmp_path / "full")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    with_lora = get_peft_model(full, LoraConfig(task_type="CAUSAL_LM", modules_to_save=["attn_hc", "ffn_hc"]))
    adapter = get_peft_model(base, adapter_config())
    low_rank_base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(low_rank_base, lora_config(), adapter_name="low_rank")
    stacked = get_peft_model(low_rank_base, adapter_config(), adapter_name="streams")
    models = {"with_lora": with_lora, "adapter": adapter, "stacked": stacked}
    ids = token_ids(base.config)
    expected = {"ids": ids}
    for name, model in models.items():
        perturb(model)
        model.save_pretrained(tmp_path / name)
        expected[name] = model.eval()(ids).logits
    torch.save(expected, tmp_path / "expected.pt")
    result = run_python(
        """
import sys, torch
import kromhc_hf
assert "peft" not in sys.modules
import peft
folder = sys.argv[1]
expected = torch.load(folder + "/expected.pt")
models = {name: peft.AutoPeftModelForCausalLM.from_pretrained(f"{folder}/{name}") for name in ("with_lora", "adapter")}
low_rank = peft.AutoPeftModelForCausalLM.from_pretrained(folder + "/stacked/low_rank", adapter_name="low_rank")
models["stacked"] = peft.PeftModel.from_pretrained(
    low_rank.get_base_model(), folder + "/stacked/streams", adapter_name="streams"
)
for name, model in models.items():
    assert torch.equal(model.eval()(expected["ids"]).logits, expected[name]), name
print("loaded", *models)
""",
        tmp_path,
    )
    assert result.stdout.splitlines()[-1:] == ["loaded with_lora adapter stacked"], result.stderr[-2000:]


@pytest.mark.parametrize("method", ["LORA", "IA3", "LN_TUNING", "VERA"])
def test_default_targets_are_those_of_the_family(method):
    config_class = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[method]]
    native = get_peft_model(base_model(), config_class(task_type="CAUSAL_LM"))
    model = get_peft_model(retrofitted(), config_class(task_type="CAUSAL_LM"))
    assert model.targeted_module_names == native.targeted_module_names


def test_every_default_of_peft_is_mirrored():
    constants = vars(peft.utils.constants)
    by_type = {
        name: c for name, c in constants.items() if name.startswith("TRANSFORMERS_MODELS_TO_") and type(c) is dict
    }
    assert len(by_type) > 10
    for mapping in by_type.values():
        for model_type in supported_model_types():
            assert mapping.get(f"kromhc_{model_type}") == mapping.get(model_type)


def test_import_without_peft():
    result = run_python(
        """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "peft":
            raise ModuleNotFoundError(name)
import importlib.util
original = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "peft" else original(name, package)
sys.meta_path.insert(0, Missing())
import kromhc_hf
from kromhc_hf import StreamMetricsCallback
try:
    from kromhc_hf import KromHCPeftConfig
except ImportError as error:
    assert "pip install 'kromhc-hf[peft]'" in str(error), error
else:
    raise SystemExit("no error")
"""
    )
    assert result.returncode == 0, result.stderr[-2000:]
