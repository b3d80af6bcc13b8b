"""LoRA on the backbone beside trained hyper-connections, with TRL's SFTTrainer on a small instruction file.

python examples/lora_sft.py [--model ID] [--instructions FILE] [--output FOLDER]
"""

import json
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from scaffold import load_model, parse_arguments, report, training_options
from trl import SFTConfig, SFTTrainer

from kromhc_hf import HyperConnectionTrainerMixin, StreamMetricsCallback, apply_hyper_connections


class LoraTrainer(HyperConnectionTrainerMixin, SFTTrainer):
    """3e-3 for the hyper-connections beside 1e-4 for LoRA, as published."""


def main() -> None:
    options = parse_arguments(__doc__ or "", "instructions", "length", steps=60, learning_rate=1e-4)
    model, tokenizer = load_model(options.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    full = Path(options.output) / "base"
    apply_hyper_connections(model, num_streams=options.num_streams).save_pretrained(full)
    tokenizer.save_pretrained(full)
    # The adapter's file names its base, so that it can be loaded in one call.
    model = type(model).from_pretrained(full)
    rows = [json.loads(line) for line in Path(options.instructions).read_text(encoding="utf-8").splitlines()]
    held_out = max(1, len(rows) // 10)
    trainer = LoraTrainer(
        model=model,
        args=SFTConfig(**training_options(options), max_length=options.length, completion_only_loss=True),
        train_dataset=Dataset.from_list(rows[held_out:]),
        eval_dataset=Dataset.from_list(rows[:held_out]),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=8, target_modules="all-linear", modules_to_save=["attn_hc", "ffn_hc"]
        ),
        callbacks=[StreamMetricsCallback(every=20, per_branch=False)],
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    trainer.save_model(options.output)
    report(before, trainer.evaluate()["eval_loss"], options.output)


if __name__ == "__main__":
    main()
