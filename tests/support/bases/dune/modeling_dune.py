"""A hybrid that transformers does not have: layers of three classes, two of which have modules of the same names."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_dune import DuneConfig


class DuneAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.heads, self.layer_idx = config.num_attention_heads, layer_idx
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None):
        shape = (*hidden_states.shape[:2], self.heads, -1)
        query, key, value = (part.view(shape).transpose(1, 2) for part in self.qkv(hidden_states).chunk(3, -1))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        return self.out(mixed.transpose(1, 2).reshape(hidden_states.shape))


class DuneRecurrence(nn.Module):
    """A leaky sum over tokens, whose state is the last one."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.into = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.leak = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, hidden_states, past_key_values=None):
        new, keep = self.into(hidden_states), self.leak.sigmoid()
        state, states = torch.zeros_like(new[:, 0]), []
        if past_key_values is not None and past_key_values.get_seq_length(self.layer_idx):
            state = past_key_values.layers[self.layer_idx].values[:, 0, -1]
        for token in new.unbind(1):
            state = keep * state + token
            states.append(state)
        mixed = torch.stack(states, 1)
        if past_key_values is not None:
            past_key_values.update(mixed[:, None], mixed[:, None], self.layer_idx)
        return mixed


class DuneMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, 2 * config.hidden_size, bias=False)
        self.down = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states):
        return self.down(F.gelu(self.up(hidden_states)))


class DuneAttentionLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.attn, self.mlp = DuneAttention(config, layer_idx), DuneMLP(config)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None):
        hidden_states = hidden_states + self.attn(self.norm_1(hidden_states), attention_mask, past_key_values)
        return hidden_states + self.mlp(self.norm_2(hidden_states))


class DuneParallelLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.attn, self.mlp = DuneAttention(config, layer_idx), DuneMLP(config)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None):
        attended = self.attn(self.norm_1(hidden_states), attention_mask, past_key_values)
        return hidden_states + (attended + self.mlp(self.norm_2(hidden_states)))


class DuneMixingLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.mixer = DuneRecurrence(config, layer_idx)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None):
        return hidden_states + self.mixer(self.norm(hidden_states), past_key_values=past_key_values)


KINDS = {"attention": DuneAttentionLayer, "parallel": DuneParallelLayer, "mixing": DuneMixingLayer}


class DunePreTrainedModel(PreTrainedModel):
    config_class = DuneConfig
    base_model_prefix = "model"
    _supports_sdpa = True


class DuneModel(DunePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(KINDS[kind](config, i) for i, kind in enumerate(config.kinds))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, use_cache=None, **kwargs):
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        hidden_states = self.embed_tokens(input_ids)
        new = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)
        mask = (torch.arange(past + len(new), device=input_ids.device) <= new[:, None])[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask.bool()[:, None, None, : past + len(new)]
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, past_key_values)
        return BaseModelOutputWithPast(self.norm(hidden_states), past_key_values)


class DuneForCausalLM(DunePreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = DuneModel(config)
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
        past_key_values = past_key_values if cache is None else cache
        outputs = self.model(input_ids, attention_mask, past_key_values, use_cache)
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss, logits, outputs.past_key_values)
