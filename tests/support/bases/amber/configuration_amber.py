"""The configuration of a Llama-like model that transformers does not have."""

from transformers import PreTrainedConfig


class AmberConfig(PreTrainedConfig):
    model_type = "amber"

    def __init__(
        self,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        eps=1e-5,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.eps = eps
        super().__init__(**kwargs)
