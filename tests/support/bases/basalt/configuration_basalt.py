"""The configuration of a model with parallel branches that transformers does not have."""

from transformers import PreTrainedConfig


class BasaltConfig(PreTrainedConfig):
    model_type = "basalt"
    attribute_map = {"hidden_size": "width", "num_hidden_layers": "depth", "max_position_embeddings": "context"}

    def __init__(self, vocab_size=64, width=32, depth=2, heads=4, context=64, dropout=0.0, **kwargs):
        self.vocab_size = vocab_size
        self.width = width
        self.depth = depth
        self.heads = heads
        self.context = context
        self.dropout = dropout
        super().__init__(**kwargs)
