"""The configuration of a model whose layers hand one of their arguments back; it is made by an order of its own."""

from transformers import PreTrainedConfig


class CinderConfig(PreTrainedConfig):
    model_type = "cinder"

    def __init__(self, vocab_size=64, hidden_size=32, depth=3, attn=None, feedback=None, context=64, **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = kwargs.pop("num_hidden_layers", depth)
        self.num_attention_heads = 4
        self.attn = attn
        self.feedback = feedback
        self.max_position_embeddings = context
        super().__init__(**kwargs)

    @property
    def attn(self):
        """The positions of the layers that see one token alone."""
        return self.__dict__["attn"]

    @attn.setter
    def attn(self, value):
        self.__dict__["attn"] = [i for i in value or () if i < self.num_hidden_layers]
