"""Run where kromhc_hf is not installed: loads converted models through the code files beside them, reports as JSON.

Arguments: pairs of a folder or Hub id and the folder to save it in again.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


TOKENS = torch.tensor([[1, 5, 9, 3]])


def refusal(source: str) -> str:
    try:
        AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False)
    except ValueError as error:
        return str(error)
    return ""


def load(source: str | Path, auto_class=AutoModelForCausalLM, **options):
    return auto_class.from_pretrained(source, trust_remote_code=True, **options)


def registered(config_class: type) -> list[str]:
    """Who has been told about a configuration, beside the Auto classes that it was loaded with."""
    names = [name for name in CONFIG_MAPPING if name.startswith("kromhc")]
    for mapping in (modeling_auto.MODEL_MAPPING, modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING):
        names += [key.__name__ for key in mapping._extra_content if key is config_class]
    return names


def visit(source: str, again: Path) -> dict[str, object]:
    report: dict[str, object] = {"refused_before": refusal(source)}
    model, info = load(source, output_loading_info=True)
    report["loading"] = sorted(str(found) for kind in info.values() for found in kind)
    report["class"] = [type(model).__name__, type(model).__module__.split(".")[0]]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    report["greedy"] = model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), **options)[0].tolist()
    report["refused_after"] = refusal(source)

    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_hc." in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
    changed = model(TOKENS).logits
    report["changed"] = not torch.equal(changed, load(source)(TOKENS).logits)
    model.save_pretrained(again)
    reloaded = load(again)
    report["reloaded_equal"] = torch.equal(changed, reloaded(TOKENS).logits)
    reloaded.save_pretrained(again)
    report["third_equal"] = torch.equal(changed, load(again)(TOKENS).logits)

    if "AutoModelForSequenceClassification" in model.config.auto_map:
        classifier = load(again, AutoModelForSequenceClassification)
        report["classifier"] = [type(classifier).__name__, list(classifier(TOKENS).logits.shape)]
        report["registered"] = registered(type(classifier.config))
    report["base"] = type(load(again, AutoModel)).__name__
    config = load(again, AutoConfig)
    report["from_config"] = type(AutoModelForCausalLM.from_config(config, trust_remote_code=True)).__name__
    if Path(source, "tokenizer.json").is_file():
        report["tokens"] = load(source, AutoTokenizer)("Once upon a time")["input_ids"]
    return report


installed = importlib.util.find_spec("kromhc_hf") is not None
pairs = zip(sys.argv[1::2], sys.argv[2::2])
print(json.dumps({source: {"installed": installed, **visit(source, Path(again))} for source, again in pairs}))
