"""Parallel branches, layers that return tuples, and learned scales inside the branches; not in transformers."""

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_basalt import BasaltConfig


class BasaltAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.heads, self.layer_idx = config.heads, layer_idx
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x, mask=None, layer_past=None):
        shape = (*x.shape[:2], self.heads, -1)
        query, key, value = (part.view(shape).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        weights = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
        weights = weights.masked_fill(~mask, torch.finfo(weights.dtype).min).softmax(-1)
        return self.out((weights @ value).transpose(1, 2).reshape(x.shape)), weights


class BasaltBlock(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.ln = nn.LayerNorm(config.width)
        self.attn = BasaltAttention(config, layer_idx)
        self.fc = nn.Sequential(nn.Linear(config.width, 64), nn.GELU(), nn.Linear(64, config.width))
        self.attn_scale = nn.Parameter(torch.full((config.width,), 0.5))
        self.fc_scale = nn.Parameter(torch.full((config.width,), 0.25))

    def forward(self, x, mask=None, layer_past=None):
        normed = self.ln(x)
        attended, weights = self.attn(normed, mask=mask, layer_past=layer_past)
        attended = attended * self.attn_scale
        x = x + (attended + self.fc(normed) * self.fc_scale)
        return x, weights


class BasaltPreTrainedModel(PreTrainedModel):
    config_class = BasaltConfig
    base_model_prefix = "trunk"
    _no_split_modules = ["BasaltBlock"]

    def _init_weights(self, module):
        if isinstance(module, BasaltBlock):
            nn.init.constant_(module.attn_scale, 0.5)
            nn.init.constant_(module.fc_scale, 0.25)
        else:
            super()._init_weights(module)


class BasaltTrunk(BasaltPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.places = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(BasaltBlock(config, i) for i in range(config.depth))
        self.last = nn.LayerNorm(config.width)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, use_cache=None, **kwargs):
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        positions = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)
        mask = (torch.arange(past + input_ids.shape[1], device=input_ids.device) <= positions[:, None])[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask.bool()[:, None, None, : mask.shape[-1]]
        x = self.tokens(input_ids) + self.places(positions)
        weights = ()
        for block in self.blocks:
            outputs = block(x, mask=mask, layer_past=past_key_values)
            x = outputs[0]
            weights = (*weights, outputs[1])
        return BaseModelOutputWithPast(self.last(x), past_key_values, None, weights)


class BasaltForCausalLM(BasaltPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"head.weight": "trunk.tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.trunk = BasaltTrunk(config)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.trunk.tokens

    def get_output_embeddings(self):
        return self.head

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
        outputs = self.trunk(input_ids, attention_mask, past_key_values, use_cache)
        logits = self.head(outputs.last_hidden_state)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss, logits, outputs.past_key_values, attentions=outputs.attentions)
