"""Reference models of TRL: policy and reference agree where a run starts, if they are made as documented."""

import copy
from math import log
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from support.adapters import perturb_hyper_connections
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer

from kromhc_hf import KromHCPeftConfig, apply_hyper_connections
from kromhc_hf.demo import MODEL


# Log probabilities of a dozen tokens are near 60, where fp32 has a spacing of 4e-6; batches of two are padded.
TOLERANCE = 1e-5
ARGUMENTS = {
    "max_steps": 1,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "per_device_train_batch_size": 2,
}


def tuned():
    """A model that was converted in memory and stands for one that was trained since."""
    model = apply_hyper_connections(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32))
    perturb_hyper_connections(model)
    return model.requires_grad_(True)


def tokenizer():
    found = AutoTokenizer.from_pretrained(MODEL)
    found.pad_token = found.eos_token
    return found


def first_log(trainer) -> dict[str, float]:
    trainer.train()
    return trainer.state.log_history[0]


def dpo(folder: Path, model, **options) -> float:
    """The first loss, log 2 where policy and reference agree."""
    pairs = {"prompt": ["Once"] * 4, "chosen": [" upon a time"] * 4, "rejected": [" dog cat"] * 4}
    arguments = DPOConfig(str(folder), **ARGUMENTS)
    trainer = DPOTrainer(
        model, args=arguments, train_dataset=Dataset.from_dict(pairs), processing_class=tokenizer(), **options
    )
    return first_log(trainer)["loss"]


def grpo(folder: Path, model) -> float:
    """The first divergence of the policy from the reference."""
    arguments = GRPOConfig(str(folder), beta=0.1, num_generations=2, max_completion_length=4, **ARGUMENTS)
    prompts, rewards = (
        Dataset.from_dict({"prompt": ["Once upon"] * 4}),
        lambda completions, **_: [1.0] * len(completions),
    )
    trainer = GRPOTrainer(model, rewards, args=arguments, train_dataset=prompts, processing_class=tokenizer())
    return first_log(trainer)["kl"]


def reloaded(folder: Path, model):
    """As the guide says: saved, and loaded from there."""
    model.save_pretrained(folder / "tuned")
    return AutoModelForCausalLM.from_pretrained(folder / "tuned")


def test_dpo_of_a_reloaded_model(tmp_path):
    assert dpo(tmp_path, reloaded(tmp_path, tuned())) == pytest.approx(log(2), abs=TOLERANCE)


def test_dpo_with_a_copy_as_reference(tmp_path):
    model = tuned()
    assert dpo(tmp_path, model, ref_model=copy.deepcopy(model)) == pytest.approx(log(2), abs=TOLERANCE)


def test_grpo_of_a_reloaded_model(tmp_path):
    assert grpo(tmp_path, reloaded(tmp_path, tuned())) == pytest.approx(0, abs=TOLERANCE)


def test_kto_with_a_copy_as_reference(tmp_path):
    model = tuned()
    rows = {"prompt": ["Once"] * 4, "completion": [" upon a time", " dog cat"] * 2, "label": [True, False] * 2}
    arguments = KTOConfig(str(tmp_path), **ARGUMENTS)
    trainer = KTOTrainer(
        model,
        ref_model=copy.deepcopy(model),
        args=arguments,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer(),
    )
    # 1 - sigmoid(0) for desirable and undesirable completions.
    assert first_log(trainer)["loss"] == pytest.approx(0.5, abs=TOLERANCE)


def test_without_the_detour_the_reference_is_the_plain_base(tmp_path):
    """What the guide warns of: the day this fails, the warning can go."""
    assert abs(dpo(tmp_path, tuned()) - log(2)) > 100 * TOLERANCE
    assert grpo(tmp_path, tuned()) > 10 * TOLERANCE


@pytest.mark.parametrize("method", ["dpo", "grpo"])
@pytest.mark.parametrize("trained", [False, True], ids=["new-adapter", "trained-adapter"])
def test_adapters(tmp_path, method, trained):
    """The base is the reference of a new adapter, a copy of a trained one."""
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model = get_peft_model(base, KromHCPeftConfig(task_type="CAUSAL_LM", num_streams=4))
    if trained:
        perturb_hyper_connections(model)
        model.save_pretrained(tmp_path / "adapter")
        base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    first = dpo(tmp_path, model) - log(2) if method == "dpo" else grpo(tmp_path, model)
    assert first == pytest.approx(0, abs=TOLERANCE)
