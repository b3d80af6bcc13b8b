"""Gives a pretrained model residual streams and fine-tunes all of it.

python examples/retrofit.py [--model ID] [--text FILE] [--output FOLDER]
"""

from scaffold import Windows, load_model, parse_arguments, report, training_arguments
from transformers import Trainer

from kromhc_hf import HyperConnectionTrainerMixin, StreamMetricsCallback, apply_hyper_connections


class RetrofitTrainer(HyperConnectionTrainerMixin, Trainer):
    """Hyper-connections get 30 times the learning rate and no weight decay."""


def main() -> None:
    options = parse_arguments(__doc__ or "", "text", "length", steps=150, learning_rate=1e-4)
    model, tokenizer = load_model(options.model)
    apply_hyper_connections(model, num_streams=options.num_streams)
    trainer = RetrofitTrainer(
        model=model,
        args=training_arguments(options, weight_decay=0.1),
        train_dataset=Windows(tokenizer, options.text, options.length),
        eval_dataset=Windows(tokenizer, options.text, options.length, held_out=True),
        callbacks=[StreamMetricsCallback(every=50, per_branch=False)],
    )
    # The same number as that of the plain model: the new streams have not changed it.
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    trainer.save_model(options.output)
    tokenizer.save_pretrained(options.output)
    report(before, trainer.evaluate()["eval_loss"], options.output)


if __name__ == "__main__":
    main()
