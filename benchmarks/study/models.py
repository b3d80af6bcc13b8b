"""The model of an arm: the base, its streams, its adapters, and the optimizer that goes with them."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.study.config import Arm
from kromhc_hf import HyperConnection, apply_hyper_connections, freeze_backbone, optimizer_param_groups
from kromhc_hf.training import hyper_connection_parameters


BETAS = (0.9, 0.95)
# Of h_post around its mean 1, with unequal writes.
WRITE_SPREAD = 0.5


def plain_model(arm: Arm, shared: Path) -> Any:
    """The model without streams, in fp32; from scratch its weights are drawn from torch's global generator."""
    if arm.backbone is None:
        return AutoModelForCausalLM.from_pretrained(shared / str(arm.model), dtype=torch.float32)
    vocabulary = len(AutoTokenizer.from_pretrained(shared / str(arm.tokenizer)))
    return LlamaForCausalLM(LlamaConfig(**{"vocab_size": vocabulary, **arm.backbone}))


def adapted_model(arm: Arm, model: Any) -> Any:
    """The plain model with the arm's streams and adapters, and what is not trained frozen; changes `model`."""
    if arm.variant is not None:
        apply_hyper_connections(model, **arm.stream_options().to_dict())
        if arm.symmetry_breaking == "unequal_writes":
            write_unequally(model)
    if arm.trained == "hyper_connections":
        freeze_backbone(model)
    return model if arm.lora_rank is None else _with_lora(model, arm.lora_rank)


@torch.no_grad()
def write_unequally(model: nn.Module) -> None:
    """Reads the mean of the streams and writes with unequal weights of mean 1, in place.

    With an exactly doubly stochastic h_res the mean of the streams is the residual of the base model, up to rounding,
    while the streams differ from the first branch on. Which stream takes the largest write moves on from branch to
    branch, as the favoured one does in the package's own init.
    """
    for module in model.modules():
        if isinstance(module, HyperConnection) and module.bias is not None:
            n = module.num_streams
            h_post = torch.linspace(1 + WRITE_SPREAD, 1 - WRITE_SPREAD, n, dtype=torch.float64)
            module.bias[:n] = torch.logit(torch.full((n,), 1 / n, dtype=torch.float64))
            module.bias[n : 2 * n] = torch.logit(h_post / 2).roll(module.branch_index % n)


def _with_lora(model: Any, rank: int) -> Any:
    # PEFT takes seconds to import, and most arms do without.
    from peft import LoraConfig, get_peft_model

    names = {path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, HyperConnection)}
    return get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=2 * rank,
            target_modules="all-linear",
            modules_to_save=sorted(names) or None,
        ),
    )


def make_optimizer(arm: Arm, model: nn.Module) -> torch.optim.Optimizer:
    if arm.variant is not None:
        groups = optimizer_param_groups(model, arm.lr, arm.lr_ratio * arm.lr, arm.weight_decay)
    else:
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trainable if p.dim() > 1], "weight_decay": arm.weight_decay},
            {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
        ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=arm.lr, betas=BETAS)


def parameter_counts(arm: Arm, model: nn.Module) -> dict[str, int]:
    """How many parameters are trained, and how many the base model does not have."""
    added = {name: p.numel() for name, p in model.named_parameters() if "lora_" in name}
    streams = hyper_connection_parameters(model) if arm.variant is not None else []
    return {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "added": sum(added.values()) + sum(p.numel() for p in streams),
    }
