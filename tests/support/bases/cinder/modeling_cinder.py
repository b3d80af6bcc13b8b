"""Layers that return tuples of several lengths, with an argument handed back; not in transformers."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_cinder import CinderConfig


class CinderAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.heads, self.layer_idx, self.narrow = config.num_attention_heads, layer_idx, layer_idx in config.attn
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False):
        shape = (*hidden_states.shape[:2], self.heads, -1)
        query, key, value = (part.view(shape).transpose(1, 2) for part in self.qkv(hidden_states).chunk(3, -1))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        weights = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
        if self.narrow:
            weights = weights * 0
        weights = weights.masked_fill(~attention_mask, torch.finfo(weights.dtype).min).softmax(-1)
        hidden_states = (weights @ value).transpose(1, 2).reshape(hidden_states.shape)
        return self.out(hidden_states), weights, past_key_values


class CinderMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, 48)
        self.down = nn.Linear(48, config.hidden_size)

    def forward(self, x, **kwargs):
        return self.down(F.gelu(self.up(x)))


class CinderBlock(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.attn_norm = nn.RMSNorm(config.hidden_size)
        self.attn = CinderAttention(config, layer_idx)
        self.mlp_norm = nn.RMSNorm(config.hidden_size)
        self.mlp = CinderMLP(config)
        self.use_feedback = config.feedback is not None

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        past_key_values=None,
        use_cache=False,
        output_attentions=False,
        states=None,
        **kwargs,
    ):
        residual = hidden_states
        if self.use_feedback:
            states = [*(states or ()), residual]
            residual = sum(states) * self.config.feedback
        hidden_states = self.attn_norm(hidden_states)
        hidden_states, attentions, past_key_values = self.attn(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.mlp(self.mlp_norm(hidden_states), **kwargs)
        hidden_states = residual + hidden_states
        outputs = (hidden_states, states)
        if output_attentions:
            outputs += (attentions,)
        if use_cache:
            outputs += (past_key_values,)
        return outputs


class CinderPreTrainedModel(PreTrainedModel):
    config_class = CinderConfig
    base_model_prefix = "model"
    _no_split_modules = ["CinderBlock"]


class CinderModel(CinderPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.places = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(CinderBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        use_cache=None,
        output_attentions=None,
        **kwargs,
    ):
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        positions = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)
        mask = (torch.arange(past + input_ids.shape[1], device=input_ids.device) <= positions[:, None])[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask.bool()[:, None, None, : mask.shape[-1]]
        hidden_states = self.embeddings(input_ids) + self.places(positions)
        states, weights, present = "as it was", (), None
        for layer in self.layers:
            outputs = layer(
                hidden_states,
                attention_mask=mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                output_attentions=output_attentions,
                states=states,
            )
            hidden_states = outputs[0]
            states = outputs[1]
            if output_attentions:
                weights = (*weights, outputs[2])
            # Where it stands is told by what was asked for.
            present = outputs[3 if output_attentions else 2] if use_cache else None
        assert states == "as it was"
        return BaseModelOutputWithPast(self.norm(hidden_states), present, None, weights or None)


class CinderForCausalLM(CinderPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = CinderModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        use_cache=None,
        labels=None,
        output_attentions=None,
        cache=None,
        **kwargs,
    ):
        # What `generate` calls it from transformers 5.24 on.
        past_key_values = past_key_values if cache is None else cache
        outputs = self.model(input_ids, attention_mask, past_key_values, use_cache, output_attentions)
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss, logits, outputs.past_key_values, attentions=outputs.attentions)
