"""Where other tools look a model class up by its name, and what they then find."""

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import transformers
from support.runs import make_trainer, retrofitted
from support.tiny import configurations, make_model
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from kromhc_hf import KromHCConfig, KromHCForCausalLM, apply_hyper_connections


ROOT = Path(__file__).parents[1]


def test_the_class_that_config_json_names_is_in_transformers(tmp_path):
    """As servers and trainers that take a folder find it, once the configuration has been read."""
    retrofitted().save_pretrained(tmp_path)
    script = (
        "import transformers, sys, kromhc_hf\n"
        "config = transformers.AutoConfig.from_pretrained(sys.argv[1])\n"
        "found = getattr(transformers, config.architectures[0])\n"
        "print(found.__name__, issubclass(found, transformers.PreTrainedModel), type(found(config)) is found)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    name = json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    assert result.stdout.split() == [name, "True", "True"], result.stderr


def test_names_are_listed_by_task():
    KromHCForCausalLM(KromHCConfig(backbone_config=configurations("llama")[0]))
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["kromhc_llama"] == "KromHCLlamaForCausalLM"
    assert transformers.KromHCLlamaForSequenceClassification.__name__ in (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_label_smoothing_shifts_labels_as_for_the_base(tmp_path, family):
    """Trainer tells by the name of the class whether the labels are those of the next token."""
    ids = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))
    base = make_model(configurations(family)[0])
    losses = []
    for model in (base, apply_hyper_connections(make_model(configurations(family)[0]))):
        trainer = make_trainer(tmp_path, model, label_smoothing_factor=0.3)
        losses.append(trainer.compute_loss(model.eval(), {"input_ids": ids, "labels": ids.clone()}).item())
    assert losses[0] == losses[1]


def test_the_entry_point_of_vllm_names_something_to_call():
    """vLLM calls it in each process, and goes on without where importing it fails."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (module, name) = re.search(r'general_plugins"\]\n\w+ = "([\w.]+):(\w+)"', text).groups()
    assert getattr(import_module(module), name)() is None
