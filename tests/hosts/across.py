"""Models that `sweep.py` saved on another release, loaded where kromhc_hf is not installed, by the code beside them.

`across.py RESULTS FOLDER CHECK` writes what came out as JSON. Families that this release does not have are left out.
"""

import dataclasses
import importlib.util
import json
import sys
import warnings
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from hosts.outcomes import Outcome, compare
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES


def token_ids(vocabulary: int) -> torch.Tensor:
    """As in support/tiny.py, which imports the package."""
    return torch.randint(3, vocabulary, (2, 12), generator=torch.Generator().manual_seed(1))


def visit(folder: Path) -> Outcome:
    """Whether a model computes and generates here what it did where it was saved; the family's own is the control.

    Bitwise, but where a release sums in another order, which the family's own model shows, and which mixing passes on
    with a gain of a few.
    """
    facts = load_file(folder / "facts.safetensors")
    if "connected.logits" not in facts:
        return Outcome("could not be saved there", native=True)  # or else is among the failures of saving

    epsilon, limit = torch.finfo(torch.float32).eps, {"native": 1e-5}

    @torch.no_grad()
    def check(kind: str) -> str:
        path = folder / kind
        model: Any = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=kind == "connected").eval()
        ids = token_ids(model.config.vocab_size)
        found, expected = model(input_ids=ids, use_cache=False).logits, facts[f"{kind}.logits"]
        gap = ((found - expected).abs().max() / expected.abs().max()).item()
        if not gap <= limit[kind]:
            return f"logits differ from those of the other release by {gap:.1e} of the largest"
        limit["connected"] = 8 * gap + 32 * epsilon if gap else 0.0
        tokens = facts.get(f"{kind}.tokens")
        if tokens is None:
            return "could not generate there"
        mask = torch.ones_like(ids)
        ids[0, :4], mask[0, :4] = 0, 0
        count = tokens.shape[1] - ids.shape[1]
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        return "" if torch.equal(model.generate(ids, attention_mask=mask, **options), tokens) else "other tokens"

    return compare(lambda: check("native"), lambda: check("connected"))


def family(folder: Path) -> str:
    return json.loads((folder / "native" / "config.json").read_text())["model_type"]


if __name__ == "__main__":
    assert importlib.util.find_spec("kromhc_hf") is None, "the package must not be importable"
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    saved = sorted(path for path in Path(sys.argv[2]).iterdir() if (path / "facts.safetensors").is_file())
    outcomes = {path.name: dataclasses.asdict(visit(path)) for path in saved if family(path) in CONFIG_MAPPING_NAMES}
    text = json.dumps({"version": transformers.__version__, "results": {sys.argv[3]: outcomes}})
    Path(sys.argv[1]).write_text(text)
