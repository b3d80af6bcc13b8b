"""The optimizers of an arm, and the learning rate over its steps."""

import math
from typing import Any

import torch
from torch import nn

from .arm import Arm
from .models import added_parameters


def make_optimizers(arm: Arm, model: nn.Module) -> list[torch.optim.Optimizer]:
    """AdamW, hyper-connections in a group of their own; with optimizer "muon", Muon for the matrices before it."""
    added = {id(parameter) for parameter in added_parameters(model)}
    ends = {id(p) for end in embeddings(model) for p in end.parameters()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    backbone = [parameter for parameter in trainable if id(parameter) not in added]
    by_muon = [p for p in backbone if arm.optimizer == "muon" and p.dim() == 2 and id(p) not in ends]
    muon = {id(parameter) for parameter in by_muon}
    rest = [parameter for parameter in backbone if id(parameter) not in muon]
    rate = arm.lr * arm.lr_ratio if arm.hyper_connection_lr is None else arm.hyper_connection_lr
    own: dict[str, Any] = {"params": [p for p in trainable if id(p) in added], "lr": rate, "weight_decay": 0.0}
    if arm.hyper_connection_betas is not None:
        own["betas"] = tuple(arm.hyper_connection_betas)
    groups = [
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": arm.weight_decay},
        {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
        own,
    ]
    made: list[torch.optim.Optimizer] = []
    if by_muon:
        # Updates of the size that AdamW's have, so that one learning rate is right for both.
        muon_options: dict[str, Any] = {"weight_decay": arm.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        made.append(torch.optim.Muon(by_muon, lr=arm.lr, **muon_options))
    filled: list[Any] = [group for group in groups if group["params"]]
    return made + [torch.optim.AdamW(filled, lr=arm.lr, betas=(arm.betas[0], arm.betas[1]))]


def embeddings(model: Any) -> list[nn.Module]:
    """What makes vectors of tokens and of positions, and logits of vectors."""
    head = model.get_output_embeddings()
    return [module for module in model.modules() if module is head or isinstance(module, nn.Embedding)]


def learning_rate(arm: Arm, step: int) -> float:
    """Share of the peak before a step counted from 0: a rise over the first ones, then half a cosine."""
    warmup = max(1, round(arm.warmup * arm.steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, arm.steps - warmup)
    return arm.final_lr + (1 - arm.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
