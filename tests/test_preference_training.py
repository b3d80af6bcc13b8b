"""DPO and GRPO of TRL: which model they take as reference, and the ways to the right one in docs/training.md."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from kromhc_hf import KromHCPeftConfig, apply_hyper_connections
from kromhc_hf.demo import MODEL as DEMO_MODEL


def base():
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL)


def disturb(model):
    """Stands for training: whatever is trainable moves, differently in each stream."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def live(folder):
    return disturb(apply_hyper_connections(base())), {}


def saved_and_loaded(folder):
    disturb(apply_hyper_connections(base())).save_pretrained(folder / "tuned")
    return AutoModelForCausalLM.from_pretrained(folder / "tuned"), {}


def saved_and_named(folder):
    saved_and_loaded(folder)
    return str(folder / "tuned"), {}


def beside_a_copy(folder):
    model = disturb(apply_hyper_connections(base()))
    return model, {"ref_model": copy.deepcopy(model)}


def adapter(folder):
    return disturb(get_peft_model(base(), KromHCPeftConfig(task_type="CAUSAL_LM"))), {}


def new_adapter(folder):
    return base(), {"peft_config": KromHCPeftConfig(task_type="CAUSAL_LM")}


def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def arguments(folder):
    return {
        "output_dir": str(folder / "run"),
        "max_steps": 1,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
    }


# Log-probabilities of some ten tokens, each of which is rounded in fp32.
ROUNDING = 1e-4


@pytest.mark.parametrize("make", [live, saved_and_loaded, saved_and_named, beside_a_copy, adapter, new_adapter])
def test_dpo(tmp_path, make):
    """Before the first step the loss is log 2 exactly if the reference computes what the trained model does."""
    model, options = make(tmp_path)
    data = Dataset.from_dict({"prompt": ["Once"] * 8, "chosen": [" upon a time"] * 8, "rejected": [" dog cat"] * 8})
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**arguments(tmp_path)),
        train_dataset=data,
        processing_class=tokenizer(),
        **options,
    )
    trainer.train()
    distance = abs(trainer.state.log_history[0]["loss"] - math.log(2))
    assert distance > 0.1 if make is live else distance < ROUNDING


@pytest.mark.parametrize("make", [live, saved_and_loaded, saved_and_named, adapter, new_adapter])
def test_grpo(tmp_path, make):
    """Before the first step there is no distance to the reference if that is the model itself."""
    model, options = make(tmp_path)
    trainer = GRPOTrainer(
        model=model,
        args=GRPOConfig(
            **arguments(tmp_path), beta=0.1, num_generations=2, per_device_train_batch_size=2, max_completion_length=8
        ),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        train_dataset=Dataset.from_dict({"prompt": ["Once"] * 4}),
        processing_class=tokenizer(),
        **options,
    )
    trainer.train()
    distance = trainer.state.log_history[0]["kl"]
    assert distance > 0.01 if make is live else distance < ROUNDING
