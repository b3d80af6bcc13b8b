"""What the two ranks of tests/test_deepspeed.py run: short Trainer runs under DeepSpeed ZeRO on gloo.

torchrun --nproc_per_node 2 tests/support/deepspeed_worker.py FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from support.runs import losses, make_trainer
from support.tiny import configurations, make_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from kromhc_hf import (
    HyperConnectionTrainerMixin,
    apply_hyper_connections,
    hyper_connection_state_dict,
    optimizer_param_groups,
)


class KromHCTrainer(HyperConnectionTrainerMixin, Trainer):
    pass


AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "bf16": {"enabled": False}}
BFLOAT16 = {"bf16": {"enabled": True}}

# Of each run: the stage, where the model comes from, whether inside zero.Init, and the configuration of DeepSpeed.
RUNS: dict[str, tuple[int, str, bool, dict[str, Any]]] = {
    "base_2": (2, "base", False, {}),
    "folder_2": (2, "converted", False, {}),
    "autocast_2": (2, "applied", False, AUTOCAST),
    "base_3": (3, "base", True, {}),
    "folder_3": (3, "converted", True, {}),
    "applied_3": (3, "applied", True, {}),
    "without_init_3": (3, "applied", False, {}),
    "autocast_base_3": (3, "base", True, AUTOCAST),
    "autocast_3": (3, "converted", True, AUTOCAST),
    "bfloat16_folder_3": (3, "converted", True, BFLOAT16),
    "bfloat16_applied_3": (3, "applied", True, BFLOAT16),
}


def load(folder: Path, source: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder / ("base" if source == "applied" else source))
    return apply_hyper_connections(model) if source == "applied" else model


def run(folder: Path, name: str, source: str, stage: int, within_init: bool, config: dict[str, Any]) -> dict[str, Any]:
    """A run of three steps that leaves its losses, groups and checkpoints, and one that resumes after the second."""
    options = {
        "max_steps": 3,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "save_strategy": "steps",
        "save_steps": 2,
        "bf16": config is BFLOAT16,
        "deepspeed": {
            "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            **config,
        },
    }
    kind = Trainer if source == "base" else KromHCTrainer
    model = None if within_init else load(folder, source)
    # From here on, zero.Init is on in stage 3; what a Trainer's arguments do.
    arguments = TrainingArguments(str(folder / name), use_cpu=True, report_to="none", **options)
    model = load(folder, source) if model is None else model
    result: dict[str, Any] = {}
    if source != "base":
        result["groups"] = {g["name"]: len(g["params"]) for g in optimizer_param_groups(model, 1e-3, weight_decay=0.1)}
    del arguments
    trainer = make_trainer(folder / name, model, kind=kind, **options)
    trainer.train()
    result["losses"] = losses(trainer)
    result["dtypes"] = sorted({str(p.dtype) for n, p in model.named_parameters() if "_hc." in n})
    result["rates"] = sorted(group["initial_lr"] for group in trainer.optimizer.param_groups)
    trainer.save_model(str(folder / name / "saved"))
    dist.barrier()
    if source != "base":
        tensors = hyper_connection_state_dict(model)
        saved = load_file(folder / name / "saved" / "model.safetensors")
        result["saved_error"] = max((saved[key] - tensors[key]).abs().max().item() for key in tensors)
        result["moved"] = max(tensors[key].abs().max().item() for key in tensors if key.endswith("_hc.weight"))
        again = make_trainer(folder / name, load(folder, source), kind=kind, **options)
        again.train(resume_from_checkpoint=str(folder / name / "checkpoint-2"))
        result["resumed"] = losses(again)
    return result


def main() -> None:
    folder = Path(sys.argv[1])
    deepspeed.init_distributed("gloo")
    if dist.get_rank() == 0:
        model = make_model(configurations("llama")[0])
        model.save_pretrained(folder / "base")
        apply_hyper_connections(model).save_pretrained(folder / "converted")
    dist.barrier()
    for name, (stage, source, within_init, config) in RUNS.items():
        try:
            result = run(folder, name, source, stage, within_init, config)
        except ValueError as error:
            result = {"refused": str(error)}
        if dist.get_rank() == 0:
            (folder / f"{name}.json").write_text(json.dumps(result))
        unset_hf_deepspeed_config()
        AcceleratorState._reset_state(True)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
