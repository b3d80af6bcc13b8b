"""Inspections made by hand, of which every number is known."""

import torch

from kromhc_hf.inspection.inspection import Inspection
from kromhc_hf.inspection.recording import BranchRecord


N = 4
IDENTITY = torch.eye(N)
UNIFORM = torch.full((N, N), 1 / N)
SWAP = IDENTITY[[1, 0, 2, 3]]
TOKENS = ("Once", " upon", "\n", "$x$", "</script>")


def record(h_res: torch.Tensor, h_pre: torch.Tensor | None = None) -> BranchRecord:
    """The record of a branch that mixes all tokens alike and sees orthogonal streams of equal length."""
    length = len(TOKENS)
    ones = torch.ones(1, length, N)
    streams = torch.eye(N, 8).expand(1, length, N, 8)
    return BranchRecord(ones if h_pre is None else h_pre, ones, h_res.expand(1, length, N, N), streams)


def handmade(*h_res: torch.Tensor, name: str = "by hand", **changes) -> Inspection:
    """An inspection of a model whose branches have these mixing matrices."""
    branches = [f"layers.{i // 2}.{kind}" for i, kind in zip(range(len(h_res)), ["attn_hc", "ffn_hc"] * len(h_res))]
    values = {
        "model_type": "kromhc_llama",
        "variant": "kromhc",
        "num_streams": N,
        "dynamic": True,
        "kernel": "'auto' (torch)",
        "added_parameters": 12,
        "tokens": TOKENS,
        "records": {branch: record(matrix) for branch, matrix in zip(branches, h_res)},
    }
    return Inspection(name=name, **{**values, **changes})
