"""Checkpoints converted on the release that comes first on the path, for `across.py` to load on others.

`converted.py RESULTS FOLDER` leaves the model that comes with the package and tiny ones of some families, plain and
converted, and what the converted ones compute.
"""

import json
import shutil
import sys
import warnings
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from hosts.sweep import generated, logits
from safetensors.torch import save_file
from support.tiny import configurations, make_model
from transformers import AutoModelForCausalLM

from kromhc_hf import convert_checkpoint
from kromhc_hf.demo import MODEL


# A single file, merged experts, another style of layer, and two kinds of layers.
FAMILIES = ("llama", "mixtral", "gpt2", "lfm2")


@torch.no_grad()
def convert(folder: Path) -> None:
    """Converts `native` in a folder to `connected`, and writes down what both compute."""
    report = convert_checkpoint(folder / "native", folder / "connected", verify=True)
    assert report.bitwise_equal
    facts = {}
    for kind in ("native", "connected"):
        model = AutoModelForCausalLM.from_pretrained(folder / kind).eval()
        facts |= {f"{kind}.logits": logits(model), f"{kind}.tokens": generated(model)[0]}
    save_file(facts, folder / "facts.safetensors")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    work = Path(sys.argv[2])
    shutil.copytree(MODEL, work / "demo" / "native")
    for family in FAMILIES:
        make_model(configurations(family)[0]).save_pretrained(work / family / "native")
    for folder in work.iterdir():
        convert(folder)
    Path(sys.argv[1]).write_text(json.dumps({"version": transformers.__version__, "results": {}}))
