"""torch.export, ONNX by it, and transformers' own exporters: logits for another batch and length than was traced."""

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
        self.model = model_of(folder, torch.float32)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def model_of(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 500, (batch, length), generator=torch.Generator().manual_seed(length))


SHAPES: Any = {"input_ids": {0: torch.export.Dim("batch", max=16), 1: torch.export.Dim("length", max=256)}}
EXAMPLE, OTHER = tokens(2, 32), tokens(3, 71)


@torch.no_grad()
def exported(models: Models, work: Path) -> tuple[float, float]:
    program = torch.export.export(Logits(models.tuned).eval(), (EXAMPLE,), dynamic_shapes=SHAPES)
    torch.export.save(program, work / "program.pt2")
    return errors(models, torch.export.load(work / "program.pt2").module()(OTHER))


@torch.no_grad()
def through_onnx(models: Models, work: Path) -> tuple[float, float]:
    import onnxruntime

    module = Logits(models.tuned).eval()
    program = torch.onnx.export(module, (EXAMPLE,), dynamo=True, dynamic_shapes=SHAPES, input_names=["input_ids"])
    program.save(work / "model.onnx")
    session = onnxruntime.InferenceSession(work / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input_ids": OTHER.numpy()})
    return errors(models, torch.from_numpy(found))


@torch.no_grad()
def by_the_exporter(models: Models, work: Path) -> tuple[float, float]:
    from transformers.exporters.base import ExportedModel
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    traced, other = ({"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in (EXAMPLE, OTHER))
    program = OnnxExporter().export(model_of(models.tuned, torch.float32), traced, OnnxConfig(dynamic=True))
    program.save_pretrained(work / "exported")
    return errors(models, ExportedModel.from_pretrained(work / "exported")(**other).logits)


def errors(models: Models, found: torch.Tensor) -> tuple[float, float]:
    """How far logits are from those in fp64, the exported ones and the model's own, in units of the largest."""
    wanted, own = (model_of(models.tuned, dtype)(OTHER).logits for dtype in (torch.float64, torch.float32))
    assert found.shape == wanted.shape
    return tuple(((logits - wanted).abs().max() / wanted.abs().max()).item() for logits in (found, own))


def near(base: tuple[float, float], converted: tuple[float, float]) -> str:
    # Both round sums of the same terms, in another order; the model says how much that comes to.
    assert all(error < 4 * own for error, own in (base, converted)), (base, converted)
    (base_error, base_own), (error, own) = base, converted
    return (
        f"the logits are within {error:.1e} of those in fp64, those of the model itself within {own:.1e} "
        f"(base: {base_error:.1e}, {base_own:.1e})"
    )


CLIENT = Client(
    tool="torch.export, ONNX",
    requirements=("onnxruntime==1.32.0", "onnx==1.23.2", "onnxscript==0.7.2"),
    use="`import kromhc_hf` where the model is loaded, then `torch.export.export` or "
    "`torch.onnx.export(..., dynamo=True)` of a module that returns logits, or `OnnxExporter` of transformers.",
    checks=(
        Check("`torch.export.export`, saved and loaded, batch and length dynamic", exported, near),
        Check("`torch.onnx.export(dynamo=True)`, run by ONNX Runtime, batch and length dynamic", through_onnx, near),
        Check("`OnnxExporter` of transformers, saved and loaded, run by ONNX Runtime", by_the_exporter, near),
    ),
)
