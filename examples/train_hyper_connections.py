"""Trains hyper-connections alone, as a PEFT adapter: the base stays as it is, the result is a small file.

python examples/train_hyper_connections.py [--model ID] [--text FILE] [--output FOLDER]
"""

from peft import get_peft_model
from scaffold import Windows, load_model, parse_arguments, report, training_arguments
from transformers import Trainer

from kromhc_hf import KromHCPeftConfig


def main() -> None:
    # The published learning rate for hyper-connections on a frozen backbone, arXiv 2607.18130.
    options = parse_arguments(__doc__ or "", "text", "length", steps=150, learning_rate=3e-3)
    base, tokenizer = load_model(options.model)
    model = get_peft_model(base, KromHCPeftConfig(task_type="CAUSAL_LM", num_streams=options.num_streams))
    model.print_trainable_parameters()
    trainer = Trainer(
        model=model,
        args=training_arguments(options),
        train_dataset=Windows(tokenizer, options.text, options.length),
        eval_dataset=Windows(tokenizer, options.text, options.length, held_out=True),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    model.save_pretrained(options.output)
    report(before, trainer.evaluate()["eval_loss"], options.output)


if __name__ == "__main__":
    main()
