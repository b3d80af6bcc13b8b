"""Options are spelled out once: a new one is a field, and shows up everywhere else by itself."""

import inspect
import json
import os
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from mypy import api as mypy
from transformers import LlamaConfig

import kromhc_hf
from kromhc_hf import (
    HyperConnection,
    KromHCConfig,
    KromHCPeftConfig,
    apply_hyper_connections,
    convert_checkpoint,
    count_parameters,
)
from kromhc_hf.modeling.families import COMPOSITE, REFUSED, ROWS
from kromhc_hf.modeling.generators import GENERATORS
from kromhc_hf.modeling.options import BRANCH_OPTIONS, OPTIONS, StreamOptions, described_option
from kromhc_hf.modeling.releases import _mappings_file, has_family
from kromhc_hf.modeling.stream_ends import READOUTS
from kromhc_hf.modeling.variants import VARIANTS


WITHOUT_WEIGHT = ("generator", "generator_rank", "read_rank")
PROJECT = Path(kromhc_hf.__file__).parents[1]
TAKE_ALL = (apply_hyper_connections, convert_checkpoint, count_parameters, KromHCPeftConfig, StreamOptions)


@pytest.mark.parametrize("function", TAKE_ALL, ids=lambda function: function.__name__)
def test_signatures_show_every_option_with_its_default(function):
    parameters = inspect.signature(function).parameters
    assert {name: parameters[name].default for name in OPTIONS} == {n: o.default for n, o in OPTIONS.items()}
    assert {name: parameters[name].annotation for name in OPTIONS} == {n: o.kind for n, o in OPTIONS.items()}


def test_a_hyper_connection_takes_what_a_branch_reads():
    parameters = inspect.signature(HyperConnection).parameters
    assert OPTIONS.keys() & parameters.keys() == {"num_streams", *BRANCH_OPTIONS}
    with pytest.raises(TypeError, match=r"takes the options variant, init, .*; got readout"):
        HyperConnection(8, 2, readout="mean")


@pytest.mark.parametrize("function", [*TAKE_ALL, KromHCConfig], ids=lambda function: function.__name__)
def test_documentation_describes_every_option(function):
    prefix = "hc_" if function is KromHCConfig else ""
    for name, option in OPTIONS.items():
        assert f" {prefix}{name}: {option.help}" in function.__doc__
    assert "**options" not in function.__doc__


def test_a_configuration_has_every_option_as_a_field():
    config = KromHCConfig(backbone_config=LlamaConfig(num_hidden_layers=1))
    assert {name for name in config.to_dict() if name.startswith("hc_")} == {f"hc_{name}" for name in OPTIONS}
    assert config.stream_options() == StreamOptions()


def test_pages_list_every_option_with_its_default():
    reference = (PROJECT / "docs" / "reference.md").read_text(encoding="utf-8")
    for name, option in OPTIONS.items():
        assert f"| `{name}` | `{option.default!r}` | {described_option(option)} |" in reference, name


def test_positional_options():
    assert count_parameters(24, 2, "mhc") == count_parameters(24, num_streams=2, variant="mhc")
    with pytest.raises(TypeError, match="must be given by name, all but num_streams and variant"):
        count_parameters(24, 2, "mhc", "paper")
    with pytest.raises(TypeError, match="must be given once; got num_streams by position and by name"):
        count_parameters(24, 2, num_streams=2)
    for call in (count_parameters, apply_hyper_connections):
        with pytest.raises(TypeError, match=r"the options are num_streams, .*; got nmu_streams"):
            call(24, nmu_streams=2)
    with pytest.raises(TypeError, match="got nmu_streams"):
        convert_checkpoint("a", "b", nmu_streams=2)


@pytest.mark.parametrize("function", [apply_hyper_connections, convert_checkpoint, count_parameters])
def test_type_hints_can_be_read(function):
    hints = typing.get_type_hints(function)
    assert {name: hints[name] for name in OPTIONS} == {name: option.kind for name, option in OPTIONS.items()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": "x"}, "eps must be of type float"),
        ({"init": "bogus"}, "init must be one of"),
        ({"readout": "bogus"}, "readout must be one of"),
        ({"num_streams": 2.5}, "num_streams must be an int"),
    ],
    ids=str,
)
def test_published_counts_refuse_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        count_parameters(24, published=True, **options)


def test_a_configuration_names_its_fields_in_rule_and_way_out():
    with pytest.raises(ValueError, match=r"^hc_num_streams must have .* Use hc_num_streams=8\.$"):
        KromHCConfig(backbone_config=LlamaConfig(num_hidden_layers=1), hc_num_streams=7)
    with pytest.raises(ValueError, match=r"Use hc_readout='mean', or hc_init='paper'"):
        KromHCConfig(backbone_config=LlamaConfig(num_hidden_layers=1), hc_readout="sum")


@pytest.mark.parametrize(
    ("options", "unread"),
    [
        ({}, {"sinkhorn_iterations", "generator_rank", "read_rank"}),
        ({"generator": "cp", "read": "gated"}, {"sinkhorn_iterations"}),
        ({"variant": "mhc"}, {"generator_rank", "read_rank"}),
        ({"variant": "mhc", "init": "paper", "readout": "sum"}, {"residual_logit", "generator_rank", "read_rank"}),
        ({"variant": "hc"}, {"sinkhorn_iterations", "residual_logit", "generator_rank", "read_rank"}),
        ({"variant": "identity", "dynamic": False}, {"sinkhorn_iterations", "residual_logit", "eps", *WITHOUT_WEIGHT}),
        ({"variant": "mhc", "dynamic": False, "readout": "softmax"}, {"eps", *WITHOUT_WEIGHT}),
        ({"variant": "mhc", "dynamic": False, "readout": "sigmoid"}, {*WITHOUT_WEIGHT}),
        ({"num_streams": 1}, OPTIONS.keys() - {"num_streams"}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_options_without_effect(options, unread):
    assert StreamOptions(**options).without_effect().keys() == unread


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["sinkhorn_iterations", "residual_logit"])
def test_without_effect_is_the_truth(variant, name):
    """An option is said to have no effect exactly where the initial mixing matrix does not depend on it."""
    default = OPTIONS[name].default
    matrices = []
    for value in (default, default / 4 if name == "residual_logit" else 1):
        options = StreamOptions(variant=variant, num_streams=3, **{name: value})
        mixing = options.mixing()
        logits = mixing.initial_logits(options.residual_logit)
        # Off the symmetric start, where one iteration is not yet enough.
        matrices.append(mixing.matrix(logits + 0.3 * logits.new_tensor(range(len(logits)))))
    equal = bool((matrices[0] == matrices[1]).all())
    assert equal == (name in StreamOptions(variant=variant, num_streams=3).without_effect())


USE = """
from transformers import LlamaForCausalLM
from kromhc_hf import HyperConnection, KromHCPeftConfig, apply_hyper_connections, convert_checkpoint
model: LlamaForCausalLM
apply_hyper_connections(model, num_streams=4, variant="mhc", dynamic=False)
apply_hyper_connections(model, 4, "mhc", eps=1e-5)
convert_checkpoint("a", "b", num_streams=2, link="hardlink")
HyperConnection(8, 4, residual_logit=2.0)
apply_hyper_connections(model, num_streams="four")
convert_checkpoint("a", "b", nmu_streams=2)
HyperConnection(8, 4, readout="mean")
KromHCPeftConfig(task_type="CAUSAL_LM", num_streams=4, eps=1e-5)
KromHCPeftConfig(num_streams="four")
"""


def test_type_checkers_know_the_options(tmp_path):
    (tmp_path / "use.py").write_text(USE)
    out, _, _ = mypy.run([str(tmp_path / "use.py"), "--config-file", str(PROJECT / "pyproject.toml"), "--no-pretty"])
    errors = [line for line in out.splitlines() if "use.py" in line and "error" in line]
    assert [line.partition("use.py:")[2].partition(":")[0] for line in errors] == ["9", "10", "11", "13"], out
    for error, said in zip(errors, ("num_streams", "nmu_streams", "readout", "num_streams"), strict=True):
        assert said in error


EVERYWHERE = """
import json, os, sys
sys.path.append("PROJECT")
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner
import kromhc_hf
from kromhc_hf import *
from kromhc_hf.cli import app
from kromhc_hf.modeling.options import OPTIONS
from kromhc_hf.study.arm import Arm

found = {"package": kromhc_hf.__file__}
sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("base")
load = AutoModelForCausalLM.from_pretrained
model = apply_hyper_connections(load("base"), throwaway=0.25)
found["configuration"] = model.config.hc_throwaway
found["layer"] = model.model.layers[0].hc_options.throwaway
model.save_pretrained("saved")
found["saved"] = load("saved").config.hc_throwaway
convert_checkpoint("base", "converted", throwaway=0.25)
found["converted"] = load("converted").config.hc_throwaway
adapted = get_peft_model(load("base"), KromHCPeftConfig(task_type="CAUSAL_LM", throwaway=0.25))
adapted.save_pretrained("adapter")
found["adapter"] = PeftModel.from_pretrained(load("base"), "adapter").peft_config["default"].throwaway
found["full model of an adapter"] = adapter_to_model(adapted).config.hc_throwaway
found["adapter of a full model"] = model_to_adapter(model, "back", "base").throwaway
save_hyper_connections(model, "alone", base_model="base")
found["alone"] = load_hyper_connections("alone").config.hc_throwaway
grow_streams(model)
found["grown"] = model.config.hc_throwaway, model.model.layers[0].hc_options.throwaway
found["study"] = Arm(variant="mhc", throwaway=0.25).stream_options().throwaway
count_parameters(16, throwaway=0.25)
command = CliRunner().invoke(app, ["convert", "base", "out", "--no-verify", "--throwaway", "0.25"])
found["command"] = load("out").config.hc_throwaway if command.exit_code == 0 else command.output
for wrong in ("x", float("nan")):
    try:
        apply_hyper_connections(load("base"), throwaway=wrong)
    except ValueError as error:
        found.setdefault("refused", []).append(str(error))
print(json.dumps(found))
"""


def test_a_new_option_is_one_field(tmp_path):
    """A copy of the package with one more field, and no other change: the option is everywhere."""
    shutil.copytree(PROJECT / "kromhc_hf", tmp_path / "kromhc_hf", ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "kromhc_hf/modeling/option_table.py"
    text, field = file.read_text(), "    stream_embedding: Annotated["
    assert text.count(field) == 1
    file.write_text(text.replace(field, f'    throwaway: Annotated[float, Option(0.5, "For a test.")]\n{field}'))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}

    def run(*arguments: str) -> str:
        options = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True}
        result = subprocess.run([sys.executable, *arguments], **options)
        assert result.returncode == 0, result.stderr
        return result.stdout

    found = json.loads(run("-c", EVERYWHERE.replace("PROJECT", str(PROJECT))).splitlines()[-1])
    assert found.pop("package").startswith(str(tmp_path))
    refused = found.pop("refused")
    assert refused[0] == "throwaway must be of type float; got 'x'. The default is 0.5."
    assert refused[1] == "throwaway must be finite; got nan. The default is 0.5."
    assert found.pop("grown") == [0.25, 0.25]
    assert set(found.values()) == {0.25}, found
    assert len(found) == 10
    assert "For a test." in run("-m", "kromhc_hf.cli", "convert", "--help")


def test_names_that_options_may_have_are_those_that_there_are():
    assert OPTIONS["variant"].choices == tuple(VARIANTS)
    assert OPTIONS["generator"].choices == tuple(GENERATORS)
    assert OPTIONS["readout"].choices == tuple(READOUTS)


def test_model_types_are_those_of_the_auto_classes():
    """The table of model types is read without the module that holds it, whose import takes torch along."""
    from transformers.models.auto import configuration_auto

    for model_type in (*ROWS, *COMPOSITE, *REFUSED):
        assert has_family(model_type) == (model_type in configuration_auto.CONFIG_MAPPING_NAMES), model_type
        assert (model_type in _mappings_file()["CONFIG_MAPPING_NAMES"]) == has_family(model_type), model_type
