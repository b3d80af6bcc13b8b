"""Tiny randomly initialised models of every family, with norm weights and biases randomised too."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM


COMMON = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# What a family needs beside or instead of the common sizes.
SPECIAL: dict[str, list[dict]] = {
    "gemma2": [{"head_dim": 8, "sliding_window": 8}],
    "gpt2": [{"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_inner": 48}],
    "gpt_neox": [{"use_parallel_residual": True}, {"use_parallel_residual": False}],
    "mistral": [{"sliding_window": 8}],
    "mixtral": [{"num_local_experts": 4, "num_experts_per_tok": 2}],
    "qwen3": [{"head_dim": 8}],
}


def configurations(model_type: str) -> list:
    """One configuration per variant of the family's layer."""
    configs = []
    for special in SPECIAL.get(model_type, [{}]):
        sizes = {} if "n_embd" in special else COMMON
        tokens = {k: COMMON[k] for k in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
        configs.append(AutoConfig.for_model(model_type, **{**tokens, **sizes, **special}))
    return configs


def make_model(config, dtype: torch.dtype = torch.float32, seed: int = 0):
    """A causal language model in eval mode whose every parameter is random, also those that start at 0 or 1."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def token_ids(config, batch: int = 2, length: int = 12) -> torch.Tensor:
    """Random token ids without the special ones, `[batch, length]`."""
    return torch.randint(3, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))
