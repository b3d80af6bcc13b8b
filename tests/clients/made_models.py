"""The models that every client is run with: a small Llama with a tokenizer, and what is made of it.

`python -m clients.made_models FOLDER` makes them; no tool is needed for that.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from clients.client import models_in
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kromhc_hf import KromHCPeftConfig, convert_checkpoint
from kromhc_hf.demo import MODEL


TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
# The widths are multiples of 64, which kernels of other tools ask for.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
MOVED, FAR = 0.02, 0.5


@torch.no_grad()
def moved(folder: Path, seed: int) -> Any:
    """A model with noise on every parameter. That on the base's is the same whatever else the model has."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for part, size in (("", MOVED), ("_hc.", FAR)):
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if ("_hc." in name) == bool(part):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    return model


def make(folder: Path) -> None:
    """Fills an empty folder with the models that `models_in` names."""
    base, converted = models_in(folder, "base"), models_in(folder, "converted")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.pad_token, tokenizer.chat_template = tokenizer.eos_token, TEMPLATE
    torch.manual_seed(0)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=512, **SIZES, **special
    )
    LlamaForCausalLM(config).save_pretrained(base.start)
    tokenizer.save_pretrained(base.start)
    convert_checkpoint(base.start, converted.start)
    for models in (base, converted):
        for seed, target in enumerate((models.tuned, models.other)):
            moved(models.start, seed).save_pretrained(target)
            tokenizer.save_pretrained(target)
    adapters = {
        base: LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
        converted: KromHCPeftConfig(task_type="CAUSAL_LM"),
    }
    for models, adapter in adapters.items():
        get_peft_model(AutoModelForCausalLM.from_pretrained(base.start), adapter).save_pretrained(models.adapter)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
