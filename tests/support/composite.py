"""Tiny models of several modalities, randomly initialised, and inputs with an image or sound that they look at.

The file is longer than others because it is one table.
"""

import inspect

import torch
from support.tiny import configurations
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from kromhc_hf.modeling.families import COMPOSITE


# The token that stands for a piece of an image or of sound; further special tokens follow it.
PLACE = 90

# Small values for fields that the configurations of towers have, by whatever name.
TOWER = {
    **dict.fromkeys(["hidden_size", "embed_dim", "d_model", "out_hidden_size", "output_dim", "projection_dim"], 32),
    **dict.fromkeys(["text_hidden_size", "vision_output_dim", "projector_input_dim", "projector_output_dim"], 32),
    **dict.fromkeys(["adapter_in_dim", "adapter_out_dim", "adapter_input_size", "encoder_hidden_size"], 32),
    **dict.fromkeys(["image_token_embed_dim", "output_channels", "downsample_hidden_size", "hidden_dim"], 32),
    **dict.fromkeys(["intermediate_size", "encoder_ffn_dim", "mlp_dim", "moe_intermediate_size"], 48),
    **dict.fromkeys(["num_hidden_layers", "depth", "encoder_layers", "num_layers", "n_layers"], 2),
    **dict.fromkeys(["resampler_depth", "num_local_experts", "pixel_shuffle_ratio"], 2),
    **dict.fromkeys(["num_attention_heads", "num_key_value_heads", "num_heads", "encoder_attention_heads"], 4),
    **dict.fromkeys(["resampler_n_latents", "num_query_tokens"], 4),
    **dict.fromkeys(["head_dim", "num_mel_bins", "n_mel_bins", "resampler_head_dim", "dim_head"], 8),
    **dict.fromkeys(["num_position_embeddings", "num_patches"], 16),
    **dict.fromkeys(["pos_emb_height", "pos_emb_width"], 4),
    **dict.fromkeys(["image_size", "window_size"], 28),
    **dict.fromkeys(["max_source_positions", "max_position_embeddings"], 64),
    "patch_size": 7,
    "pixel_shuffle_ratio": 0.5,
    "resampler_n_heads": 4,
    "initializer_range": 0.02,
    "global_attn_indexes": [0, 1],
    "vocab_size": 99,
}

# Fields of the whole.
WHOLE = {
    **dict.fromkeys(["image_token_id", "image_token_index", "audio_token_id", "audio_token_index"], PLACE),
    **dict.fromkeys(["video_token_id", "video_token_index"], PLACE + 1),
    **dict.fromkeys(["vision_start_token_id", "image_start_token_id", "boi_token_index", "boi_token_id"], PLACE + 2),
    **dict.fromkeys(["vision_end_token_id", "image_end_token_id", "eoi_token_index", "eoi_token_id"], PLACE + 3),
    **dict.fromkeys(["audio_start_token_id", "boa_token_id", "video_start_token_id"], PLACE + 4),
    **dict.fromkeys(["audio_end_token_id", "eoa_token_index", "video_end_token_id"], PLACE + 5),
    **dict.fromkeys(["projector_hidden_size", "projection_dim", "hidden_size", "projection_hidden_size"], 32),
    **dict.fromkeys(["image_text_hidden_size", "out_hidden_size"], 32),
    "alignment_intermediate_size": 64,
    "num_query_tokens": 4,
}


def small_tower(config, **special):
    """The fields of a tower's configuration, made small; towers in towers likewise."""
    fields = {name: value for name, value in TOWER.items() if name in vars(config)}
    for name, part in vars(config).items():
        if isinstance(part, PreTrainedConfig):
            fields[name] = small_tower(part, **special.pop(name, {}))
    if special.get("model_type", config.model_type) != config.model_type:
        return special
    return {**({"model_type": config.model_type} if config.model_type else {}), **fields, **special}


def composite_configuration(model_type: str, **special):
    """A tiny configuration; fields may be given, of towers as dicts that are merged into theirs."""
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    special = dict(special)
    text = special.pop("text_config", {})
    fields = {name: value for name, value in WHOLE.items() if name in vars(default)}
    fields["text_config"] = {**configurations(text.get("model_type", COMPOSITE[model_type]))[0].to_dict(), **text}
    for name, part in vars(default).items():
        given = (
            special.pop(name, {}) if isinstance(part, PreTrainedConfig) or isinstance(special.get(name), dict) else {}
        )
        if name != "text_config" and (isinstance(part, PreTrainedConfig)):
            fields[name] = small_tower(part, **given)
        elif given:
            fields[name] = given
    return config_class(**{**fields, **special})


PIXELS = {"pixel_values": (2, 3, 28, 28)}
TILES = {"pixel_values": (2, 1, 3, 28, 28)}
SIZED = {**PIXELS, "image_sizes": [[28, 28], [28, 28]]}
SIZED_TILES = {**TILES, "image_sizes": SIZED["image_sizes"]}
GRID = {"image_grid_thw": [[1, 4, 4], [1, 4, 4]]}
PATCHES = {"pixel_values": (32, 3 * 49), **GRID}
PATCHES_OVER_TIME = {"pixel_values": (32, 2 * 3 * 49), **GRID}
SQUARES = {"pixel_values": (32, 3, 7, 7), **GRID}
MROPE = {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}}
HALF_MROPE = {
    "text_config": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 0],
        }
    }
}
ALL_LAYERS = {"vision_feature_layer": -1}
SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
MEL = {"input_features": (2, 8, 64)}

# What a type needs: how many tokens an image or sound takes, fields of the configuration, and inputs: the shape of
# random numbers as a tuple, or integers as a list.
CASES = {
    "apertus1p5": (
        16,
        {
            "image_token_offset": 3,
            "audio_config": {"codebook_dim": 32, "codebook_size": 16, "num_filters": 4},
            "audio_token_offset": 67,
            "vision_config": {
                "codebook_size": 64,
                "embed_dim": 4,
                "latent_channels": 4,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "attn_resolutions": [],
                "resolution": 8,
            },
        },
        {"pixel_values": (2, 3, 8, 8), "image_sizes": [[8, 8]] * 2},
    ),
    "aria": (4, {"projector_patch_to_query_dict": {16: 4}}, PIXELS),
    "aya_vision": (4, {}, PIXELS),
    "blip-2": (4, {}, PIXELS),
    "cohere2_vision": (4, {}, PIXELS),
    "cohere_compass": (4, {"vision_config": {"deepstack_visual_indexes": [0, 1]}}, PATCHES_OVER_TIME),
    "cosmos3_edge": (4, {}, PATCHES),
    "cosmos3_omni": (4, {"vision_config": {"deepstack_visual_indexes": [0, 1]}}, PATCHES_OVER_TIME),
    "deepseek_ocr2": (
        145,
        {
            "vision_config": {
                "sam_config": {
                    "image_size": 96,
                    "patch_size": 2,
                    "global_attn_indexes": [],
                    "downsample_channels": [32, 32],
                    "window_size": 6,
                }
            }
        },
        {"pixel_values": (2, 3, 96, 96)},
    ),
    "deepseek_vl": (16, {}, PIXELS),
    "deepseek_vl_hybrid": (16, {}, {**PIXELS, "high_res_pixel_values": (2, 3, 28, 28)}),
    "dots3_note": (4, {"vision_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 1}}, PATCHES),
    "emu3": (
        20,
        {
            "vocabulary_map": {
                "<|extra_200|>": PLACE + 4,
                "<image>": PLACE,
                **{f"<|visual token {i:06d}|>": 40 + i for i in range(16)},
            },
            "vq_config": {
                "codebook_size": 16,
                "base_channels": 32,
                "channel_multiplier": [1, 1, 1, 1],
                "num_res_blocks": 1,
                "embed_dim": 4,
            },
        },
        {"pixel_values": (2, 3, 32, 32), "image_sizes": [[32, 32]] * 2},
    ),
    "ernie4_5_vl_moe": (4, {}, PATCHES),
    "exaone4_5": (4, {}, PATCHES_OVER_TIME),
    "fast_vlm": (
        16,
        {
            "vision_config": {
                "model_type": "resnet",
                "embedding_size": 16,
                "hidden_sizes": [16, 32],
                "depths": [1, 1],
                "hidden_size": 32,
            }
        },
        PIXELS,
    ),
    "fun_asr_nano": (
        32,
        {"adaptor_config": {"intermediate_size": 8}},
        {"input_features": (2, 32, 56), "input_features_mask": [[1] * 32] * 2},
    ),
    "fuyu": (16, {"patch_size": 7, "image_size": 28}, {"image_patches": (2, 16, 147)}),
    "gemma3": (4, {"mm_tokens_per_image": 4}, PIXELS),
    "gemma4": (
        4,
        {
            "vision_config": small_tower(
                CONFIG_MAPPING["gemma4_vision"](), pooling_kernel_size=2, position_embedding_size=16
            )
        },
        {"pixel_values": (2, 16, 147), "image_position_ids": [[[x, y] for y in range(4) for x in range(4)]] * 2},
    ),
    "gemma4_unified": (
        4,
        {
            "vision_config": {
                "mm_embed_dim": 32,
                "mm_posemb_size": 16,
                "output_proj_dims": 32,
                "patch_size": 7,
                "pooling_kernel_size": 2,
            }
        },
        {"pixel_values": (2, 4, 3 * 14 * 14), "image_position_ids": [[[x, y] for y in range(2) for x in range(2)]] * 2},
    ),
    "glm46v": (4, MROPE, PATCHES_OVER_TIME),
    "glm4v": (4, MROPE, PATCHES_OVER_TIME),
    "glm4v_moe": (4, HALF_MROPE, PATCHES_OVER_TIME),
    "glm_ocr": (4, HALF_MROPE, PATCHES_OVER_TIME),
    "glmasr": (8, {"audio_config": {"intermediate_size": 128}}, {**MEL, "input_features_mask": [[1] * 64] * 2}),
    "glmga": (4, HALF_MROPE, PATCHES_OVER_TIME),
    "got_ocr2": (1, {}, PIXELS),
    "granite_docling": (
        1,
        {"vision_config": {"deepstack_visual_indexes": [0, 1]}},
        {**TILES, "pixel_attention_mask": [[True]] * 2},
    ),
    "granite_speech": (15, {}, {"input_features": (2, 64, 160)}),
    "granite_speech_plus": (15, {}, {"input_features": (2, 64, 160)}),
    "hunyuan_vl": (8, {**MROPE, "vision_config": {"max_image_size": 28, "img_max_token_num": 16}}, PATCHES),
    "hyperclovax_vision_v2": (4, {}, PATCHES_OVER_TIME),
    "idefics2": (4, {}, TILES),
    "idefics3": (4, {}, TILES),
    "inkling_mm_model": (2, {"vision_config": {"n_layers": 4, "patch_size": 4}}, {"pixel_values": (4, 2, 4, 4, 3)}),
    "instructblip": (4, {}, {**PIXELS, "qformer_input_ids": [[5, 6, 7]] * 2}),
    "instructblipvideo": (
        16,
        {"video_token_index": PLACE},
        {"pixel_values": (2, 4, 3, 28, 28), "qformer_input_ids": [[5, 6, 7]] * 2},
    ),
    "internvl": (4, {}, PIXELS),
    "janus": (
        16,
        {"vq_config": {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "num_embeddings": 32}},
        PIXELS,
    ),
    "kimi_k25": (4, {}, SQUARES),
    "kosmos-2": (4, {"latent_query_num": 4}, PIXELS),
    "kosmos-2.5": (
        4,
        {"latent_query_num": 4, "vision_config": {"patch_embed_hidden_size": 147}},
        {"flattened_patches": (2, 16, 2 + 147)},
    ),
    "lfm2_vl": (
        4,
        {},
        {"pixel_values": (2, 16, 147), "spatial_shapes": [[4, 4]] * 2, "pixel_attention_mask": [[1] * 16] * 2},
    ),
    "lfm3_vl": (4, {}, PATCHES_OVER_TIME),
    "lighton_ocr": (4, {}, SIZED),
    "llama4": (4, {"vision_config": {"intermediate_size": 128}}, PIXELS),
    "llava": (16, ALL_LAYERS, PIXELS),
    "llava_next": (
        36,
        {**ALL_LAYERS, "image_grid_pinpoints": [[28, 28]]},
        {"pixel_values": (2, 2, 3, 28, 28), "image_sizes": SIZED["image_sizes"]},
    ),
    "llava_next_video": (
        36,
        {**ALL_LAYERS, "image_grid_pinpoints": [[28, 28]]},
        {"pixel_values": (2, 2, 3, 28, 28), "image_sizes": SIZED["image_sizes"]},
    ),
    "llava_onevision": (
        36,
        {"image_grid_pinpoints": [[28, 28]]},
        {"pixel_values": (2, 2, 3, 28, 28), "image_sizes": SIZED["image_sizes"]},
    ),
    "minicpm_ocr": (
        4,
        {"image_token_id": PLACE, "insert_layer_id": 0},
        {"pixel_values": (1, 3, 7, 7 * 32), "target_sizes": [[4, 4]] * 2},
    ),
    "minicpmv4_6": (
        1,
        {"image_token_id": PLACE, "insert_layer_id": 0},
        {"pixel_values": (1, 3, 7, 7 * 32), "target_sizes": [[4, 4]] * 2},
    ),
    "minicpmv4_7": (
        1,
        {"image_token_id": PLACE, "insert_layer_id": 0},
        {"pixel_values": (1, 3, 7, 7 * 32), "target_sizes": [[4, 4]] * 2},
    ),
    "minimax_m3_vl": (4, {}, PATCHES_OVER_TIME),
    "mistral3": (4, {}, SIZED),
    "mistral_large4": (4, {}, SIZED),
    "molmo2": (
        4,
        {
            "vision_config": {"image_size": [28, 28]},
            "adapter_config": {"vision_feature_layer": [0, 1]},
            "image_patch_id": PLACE,
        },
        {
            "pixel_values": (2, 16, 147),
            "image_token_pooling": [[4 * i + j for j in range(4)] for i in range(8)],
            "image_grids": [[1, 2, 1, 2]] * 2,
            "image_num_crops": [1, 1],
        },
    ),
    "moss_transcribe_diarize": (16, {}, {"input_features": (2, 8, 128), "input_features_mask": [[1] * 128] * 2}),
    "muse_glimmer": (4, {"out_hidden_size": 128}, PATCHES_OVER_TIME),
    "nemo_speechlm": (
        8,
        {
            "audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 32}}},
            "word_timestamp_config": {"blank_token_id": 98},
        },
        {"input_features": (2, 64, 8), "input_features_mask": [[1] * 64] * 2},
    ),
    "nemotron_h_omni": (
        4,
        {
            "vision_config": {
                "video_temporal_patch_size": 2,
                "patch_dim": 147,
                "video_patch_dim": 294,
                "max_img_size": 28,
            },
            "vision_hidden_size": 32,
        },
        {"pixel_values": (32, 147), "image_grid_hw": [[4, 4]] * 2},
    ),
    "omniasr": (
        5,
        {
            "audio_config": {
                "conv_dim": [8, 8],
                "conv_kernel": [4, 2],
                "conv_stride": [2, 2],
                "num_conv_pos_embeddings": 4,
                "num_conv_pos_embedding_groups": 2,
                "layerdrop": 0.0,
            }
        },
        {"input_values": (2, 1, 22)},
    ),
    "ovis2": (16, {}, PIXELS),
    "paddleocr_vl": (4, MROPE, SQUARES),
    "paligemma": (16, {}, PIXELS),
    "perception_lm": (
        16,
        {
            "vision_config": {"model_type": "siglip_vision_model", **SIGLIP, "model_args": {"embed_dim": 32}},
            "vision_use_cls_token": False,
        },
        TILES,
    ),
    "pp_chart2table": (1, {}, PIXELS),
    "qianfan_ocr": (4, {}, PIXELS),
    "qwen2_5_omni_thinker": (4, {**MROPE, "vision_start_token_id": PLACE + 2}, PATCHES_OVER_TIME),
    "qwen2_5_vl": (4, MROPE, PATCHES_OVER_TIME),
    "qwen2_audio": (32, {}, {"input_features": (2, 8, 128), "feature_attention_mask": [[1] * 128] * 2}),
    "qwen2_vl": (4, MROPE, PATCHES_OVER_TIME),
    "qwen3_5": (4, {}, PATCHES_OVER_TIME),
    "qwen3_5_moe": (4, {}, PATCHES_OVER_TIME),
    "qwen3_asr": (13, {}, {"input_features": (2, 8, 100), "input_features_mask": [[1] * 100] * 2}),
    "qwen3_omni_moe_thinker": (
        4,
        {**MROPE, "vision_start_token_id": PLACE + 2, "vision_config": {"deepstack_visual_indexes": [0, 1]}},
        PATCHES_OVER_TIME,
    ),
    "qwen3_vl": (4, {"vision_config": {"deepstack_visual_indexes": [0, 1]}}, PATCHES_OVER_TIME),
    "qwen3_vl_moe": (4, {"vision_config": {"deepstack_visual_indexes": [0, 1]}}, PATCHES_OVER_TIME),
    "smolvlm": (4, {}, TILES),
    "step3p7": (1, {}, PIXELS),
    "unlimited_ocr": (3, {"vision_config": {"sam_config": {"downsample_channels": [32, 32]}}}, PIXELS),
    "vibevoice_asr": (
        4,
        {
            f"{kind}_tokenizer_encoder_config": {"num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]}
            for kind in ("acoustic", "semantic")
        },
        {"input_values": (2, 1, 16)},
    ),
    "video_llama_3": (4, {}, {**PATCHES, "image_merge_sizes": [2, 2]}),
    "video_llava": (16, {}, {"pixel_values_images": (2, 3, 28, 28)}),
    "vipllava": (16, {"vision_feature_layer": [-1, -2], "vision_feature_layers": [-1, -2]}, PIXELS),
    "voxtral": (16, {"audio_config": {"intermediate_size": 128}}, {"input_features": (2, 8, 128)}),
}


def composite_inputs(model_type: str, model) -> dict[str, torch.Tensor]:
    """Two rows of text around an image or sound."""
    places, _, others = CASES[model_type]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 80, (2, 6 + places), generator=generator)
    ids[:, 2 : 2 + places] = PLACE
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    known = inspect.signature(type(model).forward).parameters
    if "mm_token_type_ids" in known:
        inputs["mm_token_type_ids"] = (ids == PLACE).int()
    if "image_embeds_position_mask" in known:
        inputs["image_embeds_position_mask"] = ids == PLACE
    for name, value in others.items():
        random = isinstance(value, tuple)
        inputs[name] = noise(name, value, generator) if random else torch.tensor(value)
    return inputs


def noise(name: str, shape, generator: torch.Generator) -> torch.Tensor:
    """Random numbers; patches that say where they are do so first."""
    values = torch.randn(shape, generator=generator)
    if name == "flattened_patches":
        values[..., :2] = 1
    return values


def make_composite(model_type: str, seed: int = 0):
    """A model in eval mode whose every parameter is random, also those that start at 0 or 1."""
    torch.manual_seed(seed)
    known = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    auto_class = AutoModelForImageTextToText if known else AutoModelForMultimodalLM
    model = auto_class.from_config(composite_configuration(model_type, **CASES[model_type][1])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2 or not parameter.any():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def other_image(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same inputs with another image or sound."""
    generator = torch.Generator().manual_seed(2)
    return {
        name: noise(name, value.shape, generator) if value.is_floating_point() else value
        for name, value in inputs.items()
    }
