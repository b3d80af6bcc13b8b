"""TRL: four trainers, each with the whole model, with LoRA, and with hyper-connections as an adapter.

The control of the last is LoRA on the plain model.
"""

from functools import partial
from pathlib import Path
from typing import Any

from clients.client import Check, Client, Models, shown


FORMS = ("full", "LoRA", "adapter")
ARGUMENTS = {
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 2,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}
PAIRS = {"prompt": ["Once"] * 8, "chosen": [" upon a time"] * 8, "rejected": [" dog cat and a house"] * 8}


def trainer_for(method: str, folder: Path, model: Any, peft_config: Any, tokenizer: Any) -> tuple[Any, str]:
    """A trainer, and what its first step logs that tells policies apart."""
    import trl
    from datasets import Dataset

    config, kind = getattr(trl, f"{method}Config"), getattr(trl, f"{method}Trainer")
    options: dict[str, Any] = {"processing_class": tokenizer, "peft_config": peft_config}
    if method == "GRPO":
        arguments = config(str(folder), beta=0.1, num_generations=2, max_completion_length=8, **ARGUMENTS)
        rewards = lambda completions, **_: [float(len(completion)) for completion in completions]  # noqa: E731
        prompts = Dataset.from_dict({"prompt": PAIRS["prompt"]})
        return kind(model, reward_funcs=rewards, args=arguments, train_dataset=prompts, **options), "reward"
    if method == "SFT":
        texts = [prompt + chosen for prompt, chosen in zip(PAIRS["prompt"], PAIRS["chosen"])]
        arguments, rows = config(str(folder), **ARGUMENTS), Dataset.from_dict({"text": texts})
    elif method == "Reward":
        whole = {name: [a + b for a, b in zip(PAIRS["prompt"], PAIRS[name])] for name in ("chosen", "rejected")}
        arguments, rows = config(str(folder), **ARGUMENTS), Dataset.from_dict(whole)
    else:
        arguments, rows = config(str(folder), **ARGUMENTS), Dataset.from_dict(PAIRS)
    return kind(model, args=arguments, train_dataset=rows, **options), "loss"


def trained(models: Models, work: Path, method: str) -> dict[str, float]:
    """The first number that each form logs; what was trained has moved and loads again with the same logits."""
    import torch
    import transformers
    from peft import LoraConfig
    from transformers import AutoTokenizer

    from kromhc_hf import KromHCPeftConfig

    task, task_type = ("SequenceClassification", "SEQ_CLS") if method == "Reward" else ("CausalLM", "CAUSAL_LM")
    auto, options = getattr(transformers, f"AutoModelFor{task}"), {"num_labels": 1} if method == "Reward" else {}
    adapters = {"full": None, "LoRA": LoraConfig(task_type=task_type, target_modules="all-linear")}
    adapters["adapter"] = KromHCPeftConfig(task_type=task_type) if models.converted else adapters["LoRA"]
    found, ids = {}, torch.arange(12)[None]
    for form, config in adapters.items():
        torch.manual_seed(0)
        model = auto.from_pretrained(models.plain if form == "adapter" else models.start, **options)
        tokenizer = AutoTokenizer.from_pretrained(models.start)
        trainer, number = trainer_for(method, work / form, model, config, tokenizer)
        trainable = [p for p in trainer.model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in trainable]
        trainer.train()
        assert any(not torch.equal(p, old) for p, old in zip(trainable, before)), f"{form} trains nothing"
        found[form] = trainer.state.log_history[0][number]
        trainer.save_model(work / form)
        torch.manual_seed(0)
        again = auto.from_pretrained(work / form, **options).eval()
        with torch.no_grad():
            error = (again(ids).logits - trainer.model.eval()(ids).logits).abs().max().item()
        assert error < 1e-6, f"{form} loads with logits that are {error} away"
    return found


def agree(base: dict[str, float], converted: dict[str, float]) -> str:
    for form in FORMS:
        assert abs(base[form] - converted[form]) < 1e-6, f"{form}: the base gives {base[form]}, ours {converted[form]}"
    return f"the first step is the base's ({shown(converted)}); trained, saved and loaded again in all three forms"


CLIENT = Client(
    tool="TRL",
    requirements=("trl==1.16.0", "accelerate", "datasets"),
    use="`import kromhc_hf`, then the trainers as ever; `peft_config=KromHCPeftConfig(task_type='CAUSAL_LM')` trains "
    "hyper-connections as the adapter. For reference models see "
    "[training](training.md#preferences-and-rewards-the-reference-model).",
    checks=tuple(
        Check(f"`{method}Trainer`: full, LoRA, adapter", partial(trained, method=method), agree)
        for method in ("SFT", "DPO", "GRPO", "Reward")
    ),
)
