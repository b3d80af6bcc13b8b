"""Models are copied and pickled, and computed with in another process: the same bits, and the same recorded states."""

import copy
import inspect
import io
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from support.adapters import adapter_config, perturb_hyper_connections
from support.connected import connected
from support.tiny import configurations, make_model, separate_streams, token_ids
from torch.nn.utils import parametrize
from transformers.modeling_utils import PreTrainedModel

from kromhc_hf import apply_hyper_connections
from kromhc_hf.modeling.modeling_kromhc import model_class


# A nested owner, layers under another name, layers of two kinds, layers that return tuples, and no attention.
FAMILIES = ("llama", "gpt2", "opt", "gemma2", "gpt_neo", "mamba", "qwen3_next")
HEADS = ("llama", "gpt2", "opt", "falcon")

# Run by a process that has made no model of its own.
CHILD = """
import io, sys, torch
torch.set_num_threads(int(sys.argv[2]))  # sums over other shares differ in the last bits
for data, ids, expected in torch.load(sys.argv[1], weights_only=False):
    model = torch.load(io.BytesIO(data), weights_only=False)
    with torch.no_grad():
        outputs = model(input_ids=ids, output_hidden_states=True)
    outputs = (outputs[0], *outputs.hidden_states)
    assert len(outputs) == len(expected), type(model)
    assert all(torch.equal(*pair) for pair in zip(outputs, expected)), type(model)
print("same")
"""


def heads(model_type: str):
    """Every model class in the family's file but those that are parts of another."""
    config = configurations(model_type)[0]
    module = inspect.getmodule(type(make_model(config)))
    classes = {
        cls
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, PreTrainedModel)
        and cls.__module__ == module.__name__
        and not cls.__name__.endswith(("PreTrainedModel", "Decoder"))
    }
    assert len(classes) >= 4
    for cls in sorted(classes, key=lambda cls: cls.__name__):
        torch.manual_seed(0)
        yield cls(copy.deepcopy(config)).eval()


def outputs_of(model, ids) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        outputs = model(input_ids=ids, output_hidden_states=True)
    return outputs[0], *outputs.hidden_states


def pickled(model) -> tuple:
    """The model in bytes, an input and what comes out, which a deep copy and an average give as well."""
    data = io.BytesIO()
    torch.save(model, data)
    ids = token_ids(model.config, batch=1)
    average = torch.optim.swa_utils.AveragedModel(model)
    copied = copy.deepcopy(model)
    expected = outputs_of(model, ids)
    for twin in (copied, average.module):
        assert type(twin) is type(model)
        assert all(torch.equal(*pair) for pair in zip(outputs_of(twin, ids), expected))
    return data.getvalue(), ids, expected


def compare_elsewhere(cases: list[tuple], folder) -> None:
    torch.save(cases, folder / "cases.pt")
    command = [sys.executable, "-c", CHILD, folder / "cases.pt", str(torch.get_num_threads())]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout.strip() == "same", result.stderr


def test_full_models_and_every_head(tmp_path):
    """In one process, which meets the classes of a family first as a causal language model, then all of its heads."""
    models = [make_model(configurations(family)[0]) for family in FAMILIES]
    models += [head for family in HEADS for head in heads(family)]
    for model in models:
        separate_streams(apply_hyper_connections(model, 4))
    compare_elsewhere([pickled(model) for model in models], tmp_path)


def test_models_with_adapters(tmp_path):
    models = [get_peft_model(make_model(configurations(family)[0]), adapter_config()).eval() for family in FAMILIES]
    for model in models:
        perturb_hyper_connections(model)
    compare_elsewhere([pickled(model) for model in models], tmp_path)


class OwnModel(model_class(*(lambda model: (model.backbone_class, model.config_class))(connected()))):
    """A class that somebody has derived from a generated one."""


def test_derived_classes_keep_their_class():
    model = OwnModel(connected().config)
    assert type(copy.deepcopy(model)) is OwnModel
    assert type(copy.deepcopy(connected())) is OwnModel.__base__
    layer = connected().model.layers[0]
    layer.scale = torch.nn.Parameter(torch.ones(()))
    parametrize.register_parametrization(layer, "scale", torch.nn.Tanh())
    with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):
        torch.save(layer, io.BytesIO())
