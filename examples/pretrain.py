"""Trains a small model from scratch with the published initialisation of hyper-connections.

python examples/pretrain.py [--model ID of the configuration and tokenizer] [--text FILE] [--output FOLDER]
"""

from scaffold import Windows, parse_arguments, report, training_arguments
from transformers import AutoConfig, AutoTokenizer, Trainer

from kromhc_hf import HyperConnectionTrainerMixin, KromHCConfig, KromHCForCausalLM, StreamMetricsCallback


class PretrainTrainer(HyperConnectionTrainerMixin, Trainer):
    # From scratch the rate of the backbone is high already; 5e-3 is the published one for hyper-connections beside it.
    hyper_connection_lr = 5e-3


def main() -> None:
    options = parse_arguments(__doc__ or "", "text", "length", steps=150, learning_rate=1e-3)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    config = KromHCConfig(
        backbone_config=AutoConfig.from_pretrained(options.model),
        hc_num_streams=options.num_streams,
        hc_init="paper",
        hc_readout="sum",
    )
    model = KromHCForCausalLM(config)
    trainer = PretrainTrainer(
        model=model,
        args=training_arguments(options, weight_decay=0.1),
        train_dataset=Windows(tokenizer, options.text, options.length),
        eval_dataset=Windows(tokenizer, options.text, options.length, held_out=True),
        callbacks=[StreamMetricsCallback(every=50, per_branch=False)],
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    trainer.save_model(options.output)
    tokenizer.save_pretrained(options.output)
    report(before, trainer.evaluate()["eval_loss"], options.output)


if __name__ == "__main__":
    main()
