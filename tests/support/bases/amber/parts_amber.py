"""What the layers of amber are made of."""

import torch
import torch.nn.functional as F
from torch import nn


class AmberNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states):
        wide = hidden_states.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(hidden_states.dtype)


class AmberAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        size = config.hidden_size
        self.heads, self.layer_idx = config.num_attention_heads, layer_idx
        self.q, self.k, self.v, self.o = (nn.Linear(size, size, bias=False) for _ in range(4))

    def forward(self, hidden_states, attention_mask=None, past_key_values=None):
        shape = (*hidden_states.shape[:2], self.heads, -1)
        query, key, value = (part(hidden_states).view(shape).transpose(1, 2) for part in (self.q, self.k, self.v))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        return self.o(mixed.transpose(1, 2).reshape(hidden_states.shape))


class AmberFeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states):
        return self.down(F.silu(self.gate(hidden_states)) * self.up(hidden_states))
