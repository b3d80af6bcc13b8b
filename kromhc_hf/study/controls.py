"""Models without streams that have what streams bring along: other sizes of writes, and more parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..applying import apply_hyper_connections
from ..modeling.hyper_connection import HyperConnection
from .arm import Arm, StudyError


# What a configuration calls the width of its MLP.
WIDTHS = ("intermediate_size", "n_inner", "ffn_dim")


class ScaledResidual(HyperConnection):
    """A plain residual connection that adds the branch output times a factor, `streams + scale * branch_output`.

    Args:
        scale: the factor at the start.
        learned: whether it is trained.
        device: of the branch, which would else wait for the factor at every step.
    """

    def __init__(self, hidden_size: int, scale: float, learned: bool, device: torch.device | None = None):
        super().__init__(hidden_size, 1)
        self.scale = nn.Parameter(torch.tensor(scale, device=device), requires_grad=learned)

    def forward(self, streams: Tensor, branches: int = 0) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        branch_input, _ = super().forward(streams)
        return branch_input, lambda branch_output: streams + (self.scale * branch_output).unsqueeze(-2)


def scale_branches(model: Any, scale: float, learned: bool) -> None:
    """Puts a factor on what every residual branch of a plain model adds, in place."""
    apply_hyper_connections(model, num_streams=1)
    for layer in model.modules():
        for name, child in layer.named_children():
            if isinstance(child, HyperConnection):
                device = next(layer.parameters()).device
                setattr(layer, name, ScaledResidual(child.hidden_size, scale, learned, device))


def as_wide_as(arm: Arm, other: Arm, count: Callable[[Arm], int]) -> Arm:
    """The plain arm with an MLP as wide as it takes to have as many parameters as another arm, to half a unit.

    Args:
        count: the number of parameters of the model of an arm.

    Raises:
        StudyError: if nobody knows what the width of the MLP is called.
    """
    backbone = dict(arm.backbone or {})
    width = next((name for name in WIDTHS if name in backbone), None)
    if width is None:
        raise StudyError(f"wider_as must have a backbone that says one of {', '.join(WIDTHS)}; got {backbone}.")

    def widened(by: int) -> Arm:
        return dataclasses.replace(arm, backbone=backbone | {width: backbone[width] + by})

    plain = count(arm)
    per_unit = count(widened(1)) - plain
    return widened(round((count(other) - plain) / per_unit))
