"""The model of an arm: the base, its streams or controls, its adapters."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ..applying import apply_hyper_connections
from ..modeling.hyper_connection import HyperConnection
from ..training import freeze_backbone, hyper_connection_parameters
from .arm import Arm
from .controls import scale_branches
from .data import vocabulary_size


# Of h_post around its mean 1, with unequal writes.
WRITE_SPREAD = 0.5


def plain_model(arm: Arm, shared: Path) -> Any:
    """The model without streams, in fp32; from scratch its weights are drawn from torch's global generator."""
    if arm.backbone is None:
        return AutoModelForCausalLM.from_pretrained(shared / str(arm.model), dtype=torch.float32)
    fields = {"model_type": "llama", "vocab_size": vocabulary_size(arm, shared), **arm.backbone}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.float32)


def adapted_model(arm: Arm, model: Any) -> Any:
    """The plain model with the arm's streams, controls and adapters, what is not trained frozen; changes `model`."""
    if arm.variant is not None:
        apply_hyper_connections(model, **arm.stream_options().to_dict())
        if arm.symmetry_breaking == "unequal_writes":
            write_unequally(model)
    if arm.branch_scale is not None:
        scale_branches(model, arm.branch_scale, arm.learned_branch_scale)
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


def added_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of hyper-connections, or of what stands in for them in a control; none in the plain model."""
    try:
        return hyper_connection_parameters(model)
    except ValueError:
        return []


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """How many parameters are trained, and how many the base model does not have."""
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    return {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "added": sum(p.numel() for p in (*adapters, *added_parameters(model)) if p.requires_grad),
    }


def size(arm: Arm, shared: Path) -> int:
    """The number of parameters of an arm's model; nothing is allocated."""
    with torch.device("meta"):
        model = plain_model(arm, shared)
    return sum(p.numel() for p in adapted_model(arm, model).parameters())
