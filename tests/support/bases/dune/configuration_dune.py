"""The configuration of a hybrid that transformers does not have."""

from transformers import PreTrainedConfig


class DuneConfig(PreTrainedConfig):
    model_type = "dune"

    def __init__(
        self,
        vocab_size=64,
        hidden_size=32,
        num_attention_heads=4,
        kinds=("attention", "mixing", "parallel", "mixing"),
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.kinds = list(kinds)
        self.num_hidden_layers = len(kinds)
        super().__init__(**kwargs)
