"""A Llama-like model that transformers does not have."""

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_amber import AmberConfig
from .parts_amber import AmberAttention, AmberFeedForward, AmberNorm


class AmberLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.first_norm = AmberNorm(config.hidden_size, config.eps)
        self.attention = AmberAttention(config, layer_idx)
        self.second_norm = AmberNorm(config.hidden_size, config.eps)
        self.feed_forward = AmberFeedForward(config)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None):
        residual = hidden_states
        hidden_states = self.attention(self.first_norm(hidden_states), attention_mask, past_key_values)
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.feed_forward(self.second_norm(hidden_states))
        hidden_states = residual + hidden_states
        return hidden_states


class AmberPreTrainedModel(PreTrainedModel):
    config_class = AmberConfig
    base_model_prefix = "model"
    _no_split_modules = ["AmberLayer"]
    _supports_sdpa = True


def visible(new, past, attention_mask, device):
    """Which tokens each new token sees, `[B or 1, 1, new, past + new]`."""
    rows = torch.arange(past, past + new, device=device)[:, None]
    seen = (torch.arange(past + new, device=device) <= rows)[None, None]
    return seen if attention_mask is None else seen & attention_mask.bool()[:, None, None, : past + new]


class AmberModel(AmberPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.places = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(AmberLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = AmberNorm(config.hidden_size, config.eps)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, use_cache=None, **kwargs):
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        new = input_ids.shape[1]
        hidden_states = self.embed_tokens(input_ids) + self.places.weight[past : past + new]
        mask = visible(new, past, attention_mask, input_ids.device)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, past_key_values)
        return BaseModelOutputWithPast(self.norm(hidden_states), past_key_values)


class AmberForCausalLM(AmberPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = AmberModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        use_cache=None,
        labels=None,
        cache=None,
        **kwargs,
    ):
        # What `generate` calls it from transformers 5.24 on.
        past_key_values = past_key_values if cache is None else cache
        outputs = self.model(input_ids, attention_mask, past_key_values, use_cache)
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss, logits, outputs.past_key_values)
