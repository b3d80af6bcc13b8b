"""torch.export and ONNX by it: logits of the exported program beside those of the model, for another length."""

from pathlib import Path
from typing import Any

import torch
from clients.client import Check, Client, Models
from torch import nn
from transformers import AutoModelForCausalLM

import kromhc_hf  # noqa: F401


class Logits(nn.Module):
    """Tokens in, logits out: no cache and no mask, which exporters want spelled out."""

    def __init__(self, folder: Path):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 500, (batch, length), generator=torch.Generator().manual_seed(length))


SHAPES: Any = {"input_ids": {0: torch.export.Dim("batch", max=16), 1: torch.export.Dim("length", max=256)}}
EXAMPLE, OTHER = tokens(2, 32), tokens(3, 71)


@torch.no_grad()
def exported(models: Models, work: Path) -> float:
    module = Logits(models.tuned)
    program = torch.export.export(module, (EXAMPLE,), dynamic_shapes=SHAPES)
    torch.export.save(program, work / "program.pt2")
    again = torch.export.load(work / "program.pt2").module()
    return relative(module(OTHER), again(OTHER))


@torch.no_grad()
def through_onnx(models: Models, work: Path) -> float:
    import onnxruntime

    module = Logits(models.tuned)
    program = torch.onnx.export(module, (EXAMPLE,), dynamo=True, dynamic_shapes=SHAPES, input_names=["input_ids"])
    program.save(work / "model.onnx")
    session = onnxruntime.InferenceSession(work / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input_ids": OTHER.numpy()})
    return relative(module(OTHER), torch.from_numpy(found))


def relative(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """The largest difference, in units of the largest logit."""
    assert found.shape == wanted.shape
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def near(base: float, converted: float) -> str:
    # Sums in another order, each within an eps of fp32; there are some hundreds in a row.
    assert max(base, converted) < 1000 * torch.finfo(torch.float32).eps, (base, converted)
    return f"logits of another length within {converted:.1e} of the largest, those of the base within {base:.1e}"


CLIENT = Client(
    tool="torch.export, ONNX",
    requirements=("onnxruntime", "onnx", "onnxscript"),
    use="`torch.export.export` of a module that returns logits, and `torch.onnx.export(..., dynamo=True)`, as in "
    "`tests/clients/onnx_export.py`; `import kromhc_hf` where the model is loaded.",
    checks=(
        Check("`torch.export.export`, saved and loaded, batch and length dynamic", exported, near),
        Check("`torch.onnx.export(dynamo=True)`, run by ONNX Runtime", through_onnx, near),
    ),
)
