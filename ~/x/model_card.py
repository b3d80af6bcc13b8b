# Code of kromhc-hf, which travels with every model that it saves.
"""The model card of a repository with hyper-connections: metadata, numbers, how to load it, citation."""

import json
from typing import Any

from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM

from .host import class_for_task
from .outside_families import has_derived_row
from .stream_layers import in_words


# In every card of this package, by which it knows that nobody has made the card their own.
MARK = "<!-- Written by kromhc-hf, and anew at every upload; remove this line to keep a card of your own. -->"
TAGS = ("kromhc", "hyper-connections", "mhc")
# By what a model is loaded, what makes its inputs, and what the Hub calls the task.
TEXT = ("AutoModelForCausalLM", "AutoTokenizer", "text-generation")
SEVERAL: dict[Any, tuple[str, str, str]] = {
    AutoModelForImageTextToText: ("AutoModelForImageTextToText", "AutoProcessor", "image-text-to-text"),
    AutoModelForMultimodalLM: ("AutoModelForMultimodalLM", "AutoProcessor", "audio-text-to-text"),
}

USE_WITH = """With kromhc-hf (`pip install kromhc-hf`), which runs no code from this repository:

```python
import kromhc_hf
from transformers import {model}, {inputs}

model = {model}.from_pretrained({name})
{variable} = {inputs}.from_pretrained({name})
```
"""

USE_WITHOUT = """With transformers alone, through the code files in this repository (modules of kromhc-hf, Apache-2.0):

```python
from transformers import {model}, {inputs}

model = {model}.from_pretrained({name}, trust_remote_code=True)
{variable} = {inputs}.from_pretrained({name}, trust_remote_code=True)
```
"""

USE_ON_BASE = """\
This repository holds the hyper-connections alone. kromhc-hf (`pip install kromhc-hf`) loads them
on top of the base model, which is fetched at the revision that they were made for:

```python
from kromhc_hf import load_hyper_connections

model = load_hyper_connections({name})
```
"""

CITATION = """## Citation

```bibtex
@misc{kromhc2026,
  title = {KromHC: Manifold-Constrained Hyper-Connections with Kronecker-Product Residual Matrices},
  year = {2026},
  eprint = {2601.21579},
  archivePrefix = {arXiv}
}
```
"""


def model_card(
    config: Any, name: str, *, tags: tuple[str, ...] = (), weights: str = "all", derived: bool | None = None
) -> str:
    """The text of README.md.

    Args:
        config: of the model; its `hc_conversion` says what is known about the base.
        name: repository id, or what to write in its place.
        tags: beside the usual ones.
        weights: "all", "hyper-connections" where the repository holds no base weights, or "none" for a configuration.
        derived: whether the row of its family was; None to look at the family.
    """
    origin = getattr(config, "hc_conversion", None) or {}
    usage = (USE_ON_BASE,) if weights == "hyper-connections" else (USE_WITH, USE_WITHOUT)
    model, inputs, task = _task(config)
    named = {
        "name": json.dumps(name),
        "model": model,
        "inputs": inputs,
        "variable": inputs.removeprefix("Auto").lower(),
    }
    parts = [
        _metadata(origin, task, tags, weights),
        f"# {name.rpartition('/')[2]}\n",
        _description(config, origin, weights, has_derived_row(config) if derived is None else derived),
        "## Use\n",
        *(text.format(**named) for text in usage),
        *([_verification(origin["verification"])] if origin.get("verification") else []),
        CITATION,
    ]
    return "\n".join(parts)


def _task(config: Any) -> tuple[str, str, str]:
    """The Auto class of a model, that of what makes its inputs, and the name of the task."""
    if config.get_text_config() is config:
        return TEXT
    family = config.backbone_config_class
    return next((names for auto, names in SEVERAL.items() if class_for_task(auto, family) is not None), TEXT)


def _metadata(origin: dict[str, Any], task: str, tags: tuple[str, ...], weights: str) -> str:
    # Values in JSON are YAML.
    fields: dict[str, Any] = {
        "library_name": "kromhc-hf" if weights == "hyper-connections" else "transformers",
        "pipeline_tag": task,
        "tags": list(dict.fromkeys((*TAGS, task, *tags))),
    }
    if origin.get("base_model"):
        relation = "adapter" if weights == "hyper-connections" else "finetune"
        fields |= {"base_model": origin["base_model"], "base_model_relation": relation}
    fields |= origin.get("license") or {}
    return "\n".join(["---", *(f"{name}: {json.dumps(value)}" for name, value in fields.items()), "---", MARK, ""])


def _description(config: Any, origin: dict[str, Any], weights: str, derived: bool) -> str:
    name = origin.get("base_model")
    base = f"[{name}](https://huggingface.co/{name})" if name else ""
    at = f" at revision `{origin['base_revision']}`" if base and origin.get("base_revision") else ""
    what = {
        "all": f"{base or 'A causal language model'}{at} with",
        "hyper-connections": f"Hyper-connections that give {base or 'a causal language model'}{at}",
        "none": "A configuration with",
    }[weights]
    return (
        f"{what} {config.hc_num_streams} residual streams instead of one ([KromHC](https://arxiv.org/abs/2601.21579)).\n"
        "Each residual branch reads a learned mixture of the streams and writes its output back with learned weights;\n"
        "a small matrix mixes them.\n\n"
        f"| model type | `{config.model_type}` |\n|---|---|\n"
        f"| variant | `{config.hc_variant}` |\n| init | `{config.hc_init}` |\n| readout | `{config.hc_readout}` |\n"
        + (f"| layers with streams | {in_words(config.hc_layers)} |\n" if config.hc_layers is not None else "")
        + ("| layers | described by a row that was derived from their source |\n" if derived else "")
    )


def _verification(numbers: dict[str, Any]) -> str:
    logits = (
        "bitwise equal"
        if numbers["bitwise_equal"]
        else f"largest difference {numbers['max_logit_difference']:.3g} (largest value {numbers['max_logit']:.3g})"
    )
    kind = "text" if numbers["text"] else "random"
    beside = f" with {numbers['image']}" if numbers.get("image") else ""
    # Heads that do not continue a text have no distribution of the next token.
    distribution = (
        f"| mean KL | {numbers['mean_kl']:.3g} nats |\n| top-1 agreement | {numbers['top1_agreement']:.2%} |\n"
        if numbers["mean_kl"] is not None
        else ""
    )
    return (
        "## Verification\n\n"
        "The base model and the converted one, as the conversion wrote it and before any training, on the same tokens "
        "(`kromhc verify` repeats it):\n\n"
        f"| compared on | {numbers['tokens']} {kind} tokens{beside} in {numbers['dtype']} |\n|---|---|\n"
        f"| {numbers.get('output') or 'logits'} | {logits} |\n{distribution}"
        f"| lossless | {'yes' if numbers['lossless'] else 'no'} |\n"
    )
