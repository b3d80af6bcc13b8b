"""Tiny bases, and the adapters that are put on them."""

import torch
from peft import LoraConfig
from support.tiny import configurations, make_model

from kromhc_hf import KromHCPeftConfig, freeze_backbone


FAMILIES = ["llama", "gpt2", "gpt_neox", "mixtral", "gemma2"]


def base_model(model_type: str = "llama", seed: int = 0, **changes):
    config = configurations(model_type)[0]
    for name, value in changes.items():
        setattr(config, name, value)
    return make_model(config, seed=seed)


def adapter_config(**options) -> KromHCPeftConfig:
    return KromHCPeftConfig(task_type="CAUSAL_LM", **options)


def lora_config() -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False, lora_alpha=2)


def perturb(model) -> None:
    """Trained parameters stand somewhere else than where they started."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def perturb_hyper_connections(model) -> None:
    perturb(freeze_backbone(model))
