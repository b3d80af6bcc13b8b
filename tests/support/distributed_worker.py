"""What the two ranks of tests/test_distributed.py run; every mode is compared with the same step in one process.

torchrun --nproc_per_node 2 tests/support/distributed_worker.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from support.tiny import configurations, make_model, token_ids
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from kromhc_hf import (
    KromHCConfig,
    freeze_backbone,
    hyper_connection_state_dict,
    optimizer_param_groups,
    record_mappings,
    shard_hyper_connections,
)
from kromhc_hf.inspection.trainer_callback import gradient_norms
from kromhc_hf.modeling.hyper_connection import HyperConnection


def reference_model():
    """A model whose every parameter is random, of two layers with attention heads for two tensor parallel ranks."""
    model = make_model(KromHCConfig(backbone_config=configurations("llama")[0]))
    for parameter in optimizer_param_groups(model, lr=1.0)[-1]["params"]:
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.train()


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def step(model, ids: torch.Tensor) -> float:
    """Backward of the loss of this rank's sequences; returns the mean loss over the ranks."""
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return (total / dist.get_world_size()).item()


def reference(ids: torch.Tensor, frozen: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    model = reference_model()
    if frozen:
        freeze_backbone(model)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(model, loss: float, ids: torch.Tensor, frozen: bool = False) -> dict:
    expected_loss, expected = reference(ids, frozen)
    gradients = {
        name.removeprefix("module."): full(p.grad) for name, p in model.named_parameters() if p.grad is not None
    }
    assert set(gradients) == set(expected)
    return {
        "loss_error": abs(loss - expected_loss),
        "gradient_error": max((gradients[name] - expected[name]).abs().max().item() for name in expected),
    }


def dtypes_in_forward(model) -> set[str]:
    """Makes every hyper-connection note the dtypes of the parameters it computes with."""
    seen = set()

    def note(module, *_):
        seen.update(str(p.dtype) for p in module.parameters())

    for module in model.modules():
        if isinstance(module, HyperConnection):
            module.register_forward_pre_hook(note)
    return seen


def ddp(folder: Path, ids: torch.Tensor, mine: torch.Tensor) -> dict:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(reference_model())
    return compare(model, step(model, mine), ids) | {"wrapper": type(model).__name__}


def frozen_ddp(folder: Path, ids: torch.Tensor, mine: torch.Tensor) -> dict:
    model = Accelerator(cpu=True).prepare(freeze_backbone(reference_model()))
    return compare(model, step(model, mine), ids, frozen=True)


def sharding(mixed_precision: str = "no") -> Accelerator:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True)
    # accelerate turns FSDP on for accelerators alone; all of its code runs on gloo too, once told to.
    if mixed_precision != "no":
        plugin.set_mixed_precision(mixed_precision)
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    accelerator.state._mixed_precision = mixed_precision
    return accelerator


def fsdp2(folder: Path, ids: torch.Tensor, mine: torch.Tensor) -> dict:
    """Loss, gradients, and a sharded checkpoint with optimizer state that goes on exactly where it stopped."""
    accelerator = sharding()
    model = reference_model()
    optimizer = torch.optim.AdamW(optimizer_param_groups(model, lr=1e-3))
    model, optimizer = accelerator.prepare(model, optimizer)
    with record_mappings(model) as records:
        result = compare(model, step(model, mine), ids)
    result["recorded"] = [list(record.h_res.shape) for record in records.values()]
    expected_norm = torch.stack([g.norm() for name, g in reference(ids)[1].items() if "_hc." in name]).norm().item()
    result["gradient_norm_error"] = abs(gradient_norms(model)["gradient_norm"] - expected_norm)
    result["sharded"] = all(hasattr(p, "full_tensor") for p in model.parameters())
    result["parameter_dtypes"] = sorted({str(p.dtype) for p in model.parameters()})
    optimizer.step()
    accelerator.save_state(str(folder / "sharded"))
    optimizer.zero_grad()
    first = step(model, mine)
    optimizer.step()
    expected = hyper_connection_state_dict(model)
    accelerator.load_state(str(folder / "sharded"))
    optimizer.zero_grad()
    result["resume_error"] = abs(step(model, mine) - first)
    optimizer.step()
    actual = hyper_connection_state_dict(model)
    result["reload_error"] = max((actual[name] - expected[name]).abs().max().item() for name in expected)
    whole = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(folder / "whole", state_dict=whole)
        saved = load_file(folder / "whole" / "model.safetensors")
        result["saved_error"] = max((saved[name] - expected[name]).abs().max().item() for name in expected)
        result["saved_dtypes"] = sorted({str(saved[name].dtype) for name in expected})
    return result


def fsdp2_bfloat16(folder: Path, ids: torch.Tensor, mine: torch.Tensor) -> dict:
    """Mixed precision: the backbone computes in bfloat16, hyper-connections in float32."""
    accelerator = sharding("bf16")
    model = reference_model()
    shard_hyper_connections(model)
    seen = dtypes_in_forward(model)
    optimizer = torch.optim.AdamW(optimizer_param_groups(model, lr=1e-3))
    model, optimizer = accelerator.prepare(model, optimizer)
    backbone = set()
    model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda m, _: backbone.add(str(m.weight.dtype)))
    loss = step(model, mine)
    optimizer.step()
    gradients = [p.grad for name, p in model.named_parameters() if "_hc." in name]
    return {
        "loss_error": abs(loss - reference(ids)[0]),
        "dtypes": sorted(seen),
        "backbone_dtypes": sorted(backbone),
        "gradient_dtypes": sorted({str(g.dtype) for g in gradients}),
        "parameter_dtypes": sorted({str(p.dtype) for p in model.parameters()}),
    }


def saved(folder: Path) -> Path:
    """The reference model as a checkpoint that all ranks can read."""
    path = folder / "reference"
    if dist.get_rank() == 0:
        reference_model().save_pretrained(path)
    dist.barrier()
    return path


def tensor_parallel(folder: Path, ids: torch.Tensor, mine: torch.Tensor) -> dict:
    """The family's own plan shards the projections; hyper-connections are replicated."""
    config = DistributedConfig(tp_size=2)
    model = AutoModelForCausalLM.from_pretrained(saved(folder), distributed_config=config).train()
    seen = dtypes_in_forward(model)
    result = compare(model, step(model, ids), ids)
    result["sharded"] = hasattr(model.model.layers[0].mlp.up_proj.weight, "full_tensor")
    result["dtypes"] = sorted(seen)
    low = AutoModelForCausalLM.from_pretrained(saved(folder), distributed_config=config, dtype=torch.bfloat16)
    seen = dtypes_in_forward(low)
    low(input_ids=ids)
    result["dtypes_of_bfloat16"] = sorted(seen)
    return result


def native_fsdp2(folder: Path, ids: torch.Tensor, mine: torch.Tensor) -> dict:
    """FSDP2 by from_pretrained itself, and the checkpoint that it saves."""
    config = DistributedConfig(fsdp_size=2)
    model = AutoModelForCausalLM.from_pretrained(saved(folder), distributed_config=config).train()
    result = compare(model, step(model, mine), ids)
    result["sharded"] = hasattr(model.model.layers[0].attn_hc.weight, "full_tensor")
    low = AutoModelForCausalLM.from_pretrained(saved(folder), distributed_config=config, dtype=torch.bfloat16)
    seen = dtypes_in_forward(low)
    low(input_ids=ids)
    result["dtypes_of_bfloat16"] = sorted(seen)
    model.save_pretrained(folder / "native")
    dist.barrier()
    expected = reference_model().state_dict()
    tensors = AutoModelForCausalLM.from_pretrained(folder / "native").state_dict()
    result["saved_error"] = max((tensors[name] - expected[name]).abs().max().item() for name in expected)
    return result


def recomputed_fsdp2(folder: Path, ids: torch.Tensor, mine: torch.Tensor) -> dict:
    """A step that keeps all streams, and one that keeps the first alone, although FSDP stands between the layers."""
    config = DistributedConfig(fsdp_size=2)
    model = AutoModelForCausalLM.from_pretrained(saved(folder), distributed_config=config).train()
    size, gradients, kept = mine.numel() * 4 * model.config.hidden_size, [], []
    for blocks in ("none", 100):
        model.config.hc_stream_recompute = blocks
        model.zero_grad()
        found: dict[int, torch.Tensor] = {}

        def note(tensor: torch.Tensor, found: dict = found) -> torch.Tensor:
            if tensor.numel() == size and tensor.dim() == 4 and tensor.stride(-2) > 0:
                found[tensor.data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(input_ids=mine, labels=mine).loss
        loss.backward()
        gradients.append({name: full(p.grad).clone() for name, p in model.named_parameters()})
        kept.append(len(found))
    different = [name for name, value in gradients[0].items() if not torch.equal(value, gradients[1][name])]
    return {"different": different, "compared": len(gradients[0]), "kept": kept}


MODES = [ddp, frozen_ddp, tensor_parallel, native_fsdp2, recomputed_fsdp2, fsdp2, fsdp2_bfloat16]


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ids = token_ids(configurations("llama")[0], batch=4)
    mine = ids.chunk(2)[dist.get_rank()]
    for mode in MODES:
        result = mode(folder, ids, mine)
        if dist.get_rank() == 0:
            (folder / f"{mode.__name__}.json").write_text(json.dumps(result))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
