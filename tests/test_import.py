"""Importing the package imports neither torch nor a family, and what it registers is there when it is asked for."""

import subprocess
import sys
from pathlib import Path

import pytest

from kromhc_hf import convert_checkpoint


DATA = Path(__file__).resolve().parents[1] / "kromhc_hf" / "demo_data"


def run(code: str) -> str:
    """What a process of its own prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


LIGHT = """
import sys

def check(step):
    heavy = [name for name in ("torch", "transformers.modeling_utils", "peft", "trl") if name in sys.modules]
    assert not heavy, (step, heavy)

for code in STEPS:
    exec(code)
    check(code)
from typer.testing import CliRunner
from kromhc_hf.cli import app
for words, exit_code in COMMANDS:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == exit_code, result.output
    check(words)
"""


def test_neither_torch_nor_a_family_is_imported():
    """One process goes through all of it: what is not there after the last step, no step has imported."""
    steps = (
        *("import kromhc_hf", "dir(kromhc_hf); kromhc_hf.supported_model_types()"),
        *("import kromhc_hf.rows", "import kromhc_hf.cli"),
    )
    commands = (
        (["--help"], 0),
        (["convert", "--help"], 0),
        (["families"], 0),
        (["families", "llama"], 0),
        (["convert"], 2),
        (["convert", "a", "b", "--variant", "mch"], 2),
        (["no-command"], 2),
    )
    run(LIGHT.replace("STEPS", repr(steps)).replace("COMMANDS", repr(commands)))


# The tables of transformers may be there before the package or after it.
@pytest.mark.parametrize("first", ["kromhc_hf", "transformers.models.auto.modeling_auto"])
def test_families_are_registered_whichever_comes_first(first):
    code = (
        f"import {first}, kromhc_hf, copy, pickle; from kromhc_hf import KromHCConfig;"
        "from transformers import AutoConfig, AutoModelForCausalLM, CONFIG_MAPPING, LlamaConfig;"
        "kinds = (CONFIG_MAPPING, copy.deepcopy(CONFIG_MAPPING), pickle.loads(pickle.dumps(CONFIG_MAPPING)));"
        "print(all(kind['kromhc_llama'] is KromHCConfig for kind in kinds),"
        "all(isinstance(value, type) for value in CONFIG_MAPPING.values()),"
        "all(isinstance(value, type) for _, value in CONFIG_MAPPING.items()));"
        "sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9);"
        "config = KromHCConfig(backbone_config=LlamaConfig(**sizes));"
        "print(type(AutoModelForCausalLM.from_config(config)).__name__)"
    )
    assert run(code).split() == ["True", "True", "True", "KromHCLlamaForCausalLM"]


def test_other_registrations_stay_beside_ours():
    code = (
        "from transformers import AutoConfig, PreTrainedConfig;"
        "Own = type('Own', (PreTrainedConfig,), {'model_type': 'own_kind'}); AutoConfig.register('own_kind', Own);"
        "import kromhc_hf; Other = type('Other', (PreTrainedConfig,), {'model_type': 'other_kind'});"
        "AutoConfig.register('other_kind', Other);"
        "print(*(type(AutoConfig.for_model(name)).__name__ for name in ('own_kind', 'other_kind')))"
    )
    assert run(code).split() == ["Own", "Other"]


def said(*words: object) -> tuple[int, list[str]]:
    """The exit code of a command in a process of its own, and its messages."""
    done = subprocess.run([sys.executable, "-m", "kromhc_hf.cli", *map(str, words)], capture_output=True, text=True)
    return done.returncode, done.stderr.splitlines()


def test_commands_say_nothing_of_other_packages(tmp_path):
    code, (message,) = said("verify", tmp_path, tmp_path)
    assert code == 2
    assert message.startswith("error: ")
    # PEFT takes bitsandbytes along.
    base, out = DATA / "gpt2-tinystories-1M", tmp_path / "out"
    convert_checkpoint(base, out)
    assert said("adapter", out, tmp_path / "adapter", "--base", base) == (0, [])


def test_the_processes_of_a_comparison_say_nothing_of_other_packages(tmp_path):
    sizes = ["--steps", 1, "--seeds", 1, "--length", 8, "--batch", 1, "--workers", 2, "--output", tmp_path / "out"]
    code, lines = said("compare", DATA / "gpt2-tinystories-1M", DATA / "tinyshakespeare.txt", *sizes)
    assert code == 0
    own = ("measuring ", "4 arms, ", *(f"{run}/4 " for run in range(5)), "pictures: ")
    assert [line for line in lines if line.strip() and not line.startswith(own)] == []
