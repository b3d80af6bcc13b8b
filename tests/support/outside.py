"""Bases whose code is not in transformers: their rows, and folders as a repository of the Hub would have them."""

import importlib
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from kromhc_hf.modeling.outside_families import BOUND, REGISTERED
from kromhc_hf.rows import LayerSpec, Row, Sublayer, block, recurrent, sequential


BASES = Path(__file__).with_name("bases")

AMBER = sequential(Sublayer("attention", "first_norm"), Sublayer("feed_forward", "second_norm"))
BASALT: LayerSpec = block(
    Sublayer("attn", "ln", scale="attn_scale"), Sublayer("fc", "ln", scale="fc_scale"), layers="blocks"
)

# Of layers of three classes, two of which have modules of the same names.
DUNE = (
    sequential(Sublayer("attn", "norm_1"), Sublayer("mlp", "norm_2"), layer_class="DuneAttentionLayer"),
    block(Sublayer("attn", "norm_1"), Sublayer("mlp", "norm_2"), layer_class="DuneParallelLayer"),
    block(recurrent("mixer", "norm")),
)
CINDER = sequential(Sublayer("attn", "attn_norm"), Sublayer("mlp", "mlp_norm"))


class Base(NamedTuple):
    """A base by the name of its folder in `bases`."""

    row: Row
    layer_class: str | None
    model_class: str
    auto_map: dict[str, str]


OUTSIDE = {
    "amber": Base(
        AMBER,
        "AmberLayer",
        "AmberForCausalLM",
        {
            "AutoConfig": "configuration_amber.AmberConfig",
            "AutoModel": "modeling_amber.AmberModel",
            "AutoModelForCausalLM": "modeling_amber.AmberForCausalLM",
        },
    ),
    "basalt": Base(
        BASALT,
        "BasaltBlock",
        "BasaltForCausalLM",
        {
            "AutoConfig": "configuration_basalt.BasaltConfig",
            "AutoModel": "modeling_basalt.BasaltTrunk",
            "AutoModelForCausalLM": "modeling_basalt.BasaltForCausalLM",
        },
    ),
    # With the habits of flash-linear-attention.
    "cinder": Base(
        CINDER,
        "CinderBlock",
        "CinderForCausalLM",
        {
            "AutoConfig": "configuration_cinder.CinderConfig",
            "AutoModel": "modeling_cinder.CinderModel",
            "AutoModelForCausalLM": "modeling_cinder.CinderForCausalLM",
        },
    ),
    "dune": Base(
        DUNE,
        None,
        "DuneForCausalLM",
        {
            "AutoConfig": "configuration_dune.DuneConfig",
            "AutoModel": "modeling_dune.DuneModel",
            "AutoModelForCausalLM": "modeling_dune.DuneForCausalLM",
        },
    ),
}


def make_outside(name: str, seed: int = 0):
    """A model with random weights, of classes that are imported from a package as a lab would have it."""
    modeling = importlib.import_module(f"support.bases.{name}.modeling_{name}")
    configuration = importlib.import_module(f"support.bases.{name}.configuration_{name}")
    torch.manual_seed(seed)
    model = getattr(modeling, OUTSIDE[name].model_class)(
        getattr(configuration, OUTSIDE[name].auto_map["AutoConfig"].rpartition(".")[2])()
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def make_repository(name: str, folder: Path) -> Path:
    """The folder of a repository with such a model and its code."""
    make_outside(name).save_pretrained(folder)
    for file in (BASES / name).glob("*.py"):
        shutil.copyfile(file, folder / file.name)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": OUTSIDE[name].auto_map}))
    return folder


def forget_families() -> None:
    """As if no family from outside had been registered, or bound to classes."""
    REGISTERED.clear()
    BOUND.clear()
