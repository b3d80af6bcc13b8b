"""Tiny randomly initialised models of every family, with norm weights and biases randomised too."""

import dataclasses

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kromhc_hf import HyperConnection, supported_model_types


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

# Small values for fields that only some configurations have.
SMALL = {
    **dict.fromkeys(["n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_k", "moe_topk"], 2),
    **dict.fromkeys(["n_group", "topk_group", "n_shared_experts"], 1),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"], 16),
    **dict.fromkeys(["moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"], 16),
    **dict.fromkeys(["dense_intermediate_size", "intermediate_size_mlp"], 24),
    **dict.fromkeys(["kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "v_head_dim", "head_dim"], 8),
    **dict.fromkeys(["qk_rope_head_dim", "rotary_dim", "index_n_heads", "index_topk", "d_rel"], 4),
    **dict.fromkeys(["index_head_dim", "sliding_window", "sliding_window_size", "rel_extent"], 8),
    **dict.fromkeys(["swa_num_attention_heads", "swa_num_key_value_heads"], 4),
    **dict.fromkeys(["swa_head_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"], 8),
    **dict.fromkeys(["linear_num_key_heads", "linear_num_heads"], 2),
    "linear_num_value_heads": 4,
    **dict.fromkeys(["mamba_d_state", "state_size", "ssm_state_size", "mamba_chunk_size", "chunk_size"], 8),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads"], 4),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim"], 16),
    "first_k_dense_replace": 1,
    "num_mtp_layers": 0,
    "head_size": 8,
}

# By the names that every release takes.
MAMBA_THEN_ATTENTION = {"layer_types": ["mamba", "attention", "mamba"]}
LINEAR_THEN_FULL = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
KOSMOS_SIZES = {"embed_dim": 32, "layers": 3, "attention_heads": 4, "ffn_dim": 48}
CONVOLUTION_THEN_FULL = {"layer_types": ["conv", "full_attention", "conv"]}
SLIDING_THEN_FULL = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
GPT2_SIZES = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}

# What a family needs beside or instead of the sizes above; one entry per variant of its layer.
SPECIAL: dict[str, list[dict]] = {
    "bailing_hybrid": [LINEAR_THEN_FULL],
    "bamba": [{"attn_layer_indices": [1]}],
    "bloom": [{"n_layer": 3, "n_head": 4}],
    "codegen": [{**GPT2_SIZES, "n_inner": 48}],
    "cohere2": [SLIDING_THEN_FULL],
    "cohere_compass_text": [
        {
            **SLIDING_THEN_FULL,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
                "full_attention": None,
            },
        }
    ],
    "cosmos3_edge_text": [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    ],
    "ctrl": [{**GPT2_SIZES, "dff": 48}],
    "dbrx": [
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 3,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
            "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        }
    ],
    "deepseek_ocr2_text": [{"mlp_layer_types": ["dense", "sparse", "sparse"]}],
    "dots3_note_text": [
        {
            **dict.fromkeys(["swa_num_attention_heads", "swa_num_key_value_heads", "swa_qk_nope_head_dim"], 4),
            **dict.fromkeys(["swa_q_lora_rank", "swa_kv_lora_rank", "swa_head_dim", "swa_v_head_dim"], 8),
        }
    ],
    "ernie4_5_vl_moe_text": [
        {
            "moe_intermediate_size": [16, 16],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        }
    ],
    "falcon": [
        {"new_decoder_architecture": False, "parallel_attn": False, "bias": True, "alibi": False},
        {"new_decoder_architecture": False, "parallel_attn": True, "multi_query": True, "alibi": True},
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ],
    "falcon_h1": [{"mamba_d_ssm": 64, "ssm_out_multiplier": 0.7, "attention_in_multiplier": 1.3}],
    "gemma4_text": [
        {
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 99,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        {"hidden_size_per_layer_input": 0},
    ],
    "gpt2": [{**GPT2_SIZES, "n_inner": 48}],
    "gpt_bigcode": [{**GPT2_SIZES, "n_inner": 48}],
    "gpt_neo": [{"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4}],
    "gpt_neox": [{"use_parallel_residual": True}, {"use_parallel_residual": False}],
    "gptj": [{**GPT2_SIZES, "n_inner": 48}],
    "granite": [{"residual_multiplier": 0.4}],
    "granitemoehybrid": [
        {**MAMBA_THEN_ATTENTION, "residual_multiplier": 0.4},
        {**MAMBA_THEN_ATTENTION, "num_local_experts": 0, "position_embedding_type": "rope"},
    ],
    "granitemoe_swa": [{"shared_intermediate_size": 16, "residual_multiplier": 0.4}, {"shared_intermediate_size": 0}],
    "granitemoeshared": [{"shared_intermediate_size": 16, "residual_multiplier": 0.4}, {"shared_intermediate_size": 0}],
    "inkling_text": [{"mlp_layer_types": ["dense", "sparse", "sparse"], "local_layer_ids": [0, 2]}],
    "jamba": [{"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4}],
    "kimi_linear": [LINEAR_THEN_FULL],
    "kosmos_2_text_model": [KOSMOS_SIZES],
    "kosmos_2_5_text_model": [KOSMOS_SIZES],
    "lfm2": [CONVOLUTION_THEN_FULL],
    "lfm2_moe": [{**CONVOLUTION_THEN_FULL, "num_dense_layers": 1}],
    "lfm3": [CONVOLUTION_THEN_FULL],
    "llama4_text": [{"num_local_experts": 4, "interleave_moe_layer_step": 2, "attention_chunk_size": 8}],
    "mamba2": [{"num_heads": 4, "head_dim": 16, "n_groups": 1}],
    "moshi": [{"ffn_dim": 48}],
    "mpt": [{"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64, "expansion_ratio": 2}],
    "nemotron_h": [{"layers_block_type": ["mamba", "attention", "moe", "mlp"], "n_groups": 1}],
    "olmo_hybrid": [LINEAR_THEN_FULL],
    "opt": [{"ffn_dim": 48, "word_embed_proj_dim": 32}],
    "phi4_multimodal": [
        {
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
            },
            "audio_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_blocks": 2,
                "num_attention_heads": 4,
                "nemo_conv_channels": 32,
                "ext_pw_out_channel": 32,
            },
        }
    ],
    "qwen3_5_moe_text": [LINEAR_THEN_FULL],
    "qwen3_5_text": [LINEAR_THEN_FULL],
    "qwen3_next": [LINEAR_THEN_FULL],
    "recurrent_gemma": [{"attention_window_size": 8, "block_types": ["recurrent", "attention", "recurrent"]}],
    "stablelm": [{"use_parallel_residual": True}, {"use_parallel_residual": False}],
    "xlstm": [{"num_blocks": 3, "num_heads": 4, "hidden_size": 128, "embedding_dim": 128, "chunk_size": 64}],
    "xglm": [{"d_model": 32, "num_layers": 3, "attention_heads": 4, "ffn_dim": 48}],
}


def configurations(model_type: str) -> list:
    """One configuration per variant of the family's layer."""
    config_class = CONFIG_MAPPING[model_type]
    fields = {field.name for field in dataclasses.fields(config_class)}
    small = {name: value for name, value in SMALL.items() if name in fields}
    # Latent attention has as many key heads as heads.
    latent = {"num_key_value_heads": 4} if "kv_lora_rank" in fields else {}
    configs = []
    for special in SPECIAL.get(model_type, [{}]):
        # A field that the family calls otherwise is given under that name alone.
        renamed = {name for name, own in config_class.attribute_map.items() if own in special}
        sizes = {name: value for name, value in {**COMMON, **latent, **small}.items() if name not in renamed}
        configs.append(AutoConfig.for_model(model_type, **{**sizes, **special}))
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


def variants() -> list[tuple[str, str, int]]:
    """`(id, model type, position in configurations)` for every variant of every supported family."""
    return [
        (name if count == 1 else f"{name}-{position}", name, position)
        for name in supported_model_types()
        for count in (len(SPECIAL.get(name, [{}])),)
        for position in range(count)
    ]


def separate_streams(model) -> None:
    """Gives every hyper-connection random weights, so that the streams differ and all of its paths matter."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, HyperConnection):
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
