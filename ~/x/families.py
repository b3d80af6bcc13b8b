# Code of kromhc-hf, which travels with every model that it saves.
"""Which model types are supported, as data: what the decoder layers of each family look like; and which are refused.

A family is one row of `SUPPORTED`; a row with several specifications describes layers of different kinds in one model.
A row that depends on the configuration is `ByConfig`. Models of several modalities are in `COMPOSITE`; their row is
that of the text model inside, and those text models that are nothing else are in `INSIDE`. The file is longer than
others because it is one table, in which every row has its neighbours beside it.
"""

from collections import ChainMap
from dataclasses import replace
from typing import Any

from .layer_spec import ByConfig, LayerSpec, Row, Step, Sublayer, block, recurrent, sequential


ATTENTION = Sublayer("self_attn", "input_layernorm")
FEED_FORWARD = Sublayer("mlp", "post_attention_layernorm")

LLAMA = sequential(ATTENTION, FEED_FORWARD)
SANDWICH = sequential(
    Sublayer("self_attn", "input_layernorm", post=("post_attention_layernorm",)),
    Sublayer("mlp", "pre_feedforward_layernorm", post=("post_feedforward_layernorm",)),
)
VAULTGEMMA = sequential(ATTENTION, Sublayer("mlp", "pre_feedforward_layernorm"))
GLM4 = sequential(
    Sublayer("self_attn", "input_layernorm", post=("post_self_attn_layernorm",)),
    Sublayer("mlp", "post_attention_layernorm", post=("post_mlp_layernorm",)),
)
AFMOE = sequential(
    Sublayer("self_attn", "input_layernorm", post=("post_attention_layernorm",)),
    Sublayer("mlp", "pre_mlp_layernorm", post=("post_mlp_layernorm",)),
)
POST_NORM = sequential(
    Sublayer("self_attn", post=("post_attention_layernorm",)), Sublayer("mlp", post=("post_feedforward_layernorm",))
)
GRANITE = sequential(ATTENTION, FEED_FORWARD, scale="residual_multiplier")
MINICPM3 = sequential(ATTENTION, FEED_FORWARD, scale="residual_scale")
HYPERCLOVAX = sequential(
    Sublayer("self_attn", "input_layernorm", post=("post_norm1",)),
    Sublayer("mlp", "post_attention_layernorm", post=("post_norm2",)),
    scale="residual_multiplier",
)
EXPERTS = Sublayer("block_sparse_moe", "post_attention_layernorm")
SHARED_EXPERT = Sublayer("shared_mlp", "post_attention_layernorm")
MAMBA = recurrent("mamba", "input_layernorm")


def granite_layer(attention: Sublayer, *feed_forward: Sublayer) -> LayerSpec:
    """A granite layer whose feed-forward is a sum of experts and a shared expert."""
    first = replace(attention, attention=True)
    scale = "residual_multiplier"
    return LayerSpec((Step("attn_hc", (first,), scale=scale), Step("ffn_hc", feed_forward, scale=scale)))


GRANITEMOE = granite_layer(ATTENTION, EXPERTS)
GRANITEMOE_SHARED = (granite_layer(ATTENTION, EXPERTS, SHARED_EXPERT), GRANITEMOE)
GRANITEMOE_HYBRID = tuple(
    granite_layer(mixer, *feed_forward)
    for mixer in (MAMBA, ATTENTION)
    for feed_forward in ((EXPERTS, SHARED_EXPERT), (SHARED_EXPERT,))
)

PHI3 = sequential(
    Sublayer("self_attn", "input_layernorm", post=("resid_attn_dropout",)),
    Sublayer("mlp", "post_attention_layernorm", post=("resid_mlp_dropout",)),
)
PERSIMMON = sequential(ATTENTION, replace(FEED_FORWARD, post=("dropout",)))
APERTUS = sequential(Sublayer("self_attn", "attention_layernorm"), Sublayer("mlp", "feedforward_layernorm"))
MODERNBERT = sequential(Sublayer("attn", "attn_norm"), Sublayer("mlp", "mlp_norm"))
JETMOE = sequential(Sublayer("self_attention", "input_layernorm"), FEED_FORWARD)
LLAMA4 = sequential(ATTENTION, Sublayer("feed_forward", "post_attention_layernorm"))

XLSTM = sequential(Sublayer("mlstm_layer", "norm_mlstm"), Sublayer("ffn", "norm_ffn"), layers="blocks")

GPT2 = sequential(Sublayer("attn", "ln_1"), Sublayer("mlp", "ln_2"), layers="h")
CTRL = sequential(
    Sublayer("multi_head_attention", "layernorm1", post=("dropout1",), repeat=3),
    Sublayer("ffn", "layernorm2", post=("dropout2",)),
    layers="h",
)
OPT = sequential(
    Sublayer("self_attn", "self_attn_layer_norm", post=("dropout",)),
    Sublayer(("fc1", "activation_fn", "fc2"), "final_layer_norm", post=("dropout",)),
    layers="decoder.layers",
)
BIOGPT = sequential(
    Sublayer("self_attn", "self_attn_layer_norm", post=("dropout",)),
    Sublayer(("fc1", "activation_fn", "activation_dropout", "fc2"), "final_layer_norm", post=("dropout",)),
)
BLOOM = sequential(
    Sublayer("self_attention", "input_layernorm", zero="residual"),
    Sublayer("mlp", "post_attention_layernorm", zero="residual"),
    layers="h",
)
MPT = sequential(
    Sublayer("attn", "norm_1", post=("resid_attn_dropout",)),
    Sublayer("ffn", "norm_2", zero="residual"),
    layers="blocks",
)
DBRX = sequential(
    Sublayer("norm_attn_norm.attn", "norm_attn_norm.norm_1", post=("norm_attn_norm.resid_pdrop",)),
    Sublayer("ffn", "norm_attn_norm.norm_2", post=("resid_pdrop",)),
    layers="blocks",
)
NEOX_JAPANESE = sequential(
    Sublayer("attention", "input_layernorm", post=("hidden_dropout",), bias=2),
    Sublayer("mlp", "post_attention_layernorm", post=("hidden_dropout",)),
)

NEOX_ATTENTION = Sublayer("attention", "input_layernorm", post=("post_attention_dropout",))
NEOX_FEED_FORWARD = Sublayer("mlp", "post_attention_layernorm", post=("post_mlp_dropout",))
NEOX = sequential(NEOX_ATTENTION, NEOX_FEED_FORWARD)
NEOX_PARALLEL = block(NEOX_ATTENTION, NEOX_FEED_FORWARD)
GPTJ = block(Sublayer("attn", "ln_1"), Sublayer("mlp", "ln_1"), layers="h")
PHI = block(
    Sublayer("self_attn", "input_layernorm", post=("resid_dropout",)),
    Sublayer("mlp", "input_layernorm", post=("resid_dropout",)),
)
COHERE = block(ATTENTION, Sublayer("mlp", "input_layernorm"), exact=False)
STABLELM = PERSIMMON
STABLELM_PARALLEL = block(ATTENTION, Sublayer("mlp", "input_layernorm", post=("dropout",)), exact=False)
FALCON_ATTENTION = Sublayer("self_attention", "input_layernorm")
FALCON_SEQUENTIAL = sequential(
    replace(FALCON_ATTENTION, post=("config.attention_dropout",)),
    Sublayer("mlp", "post_attention_layernorm", post=("hidden_dropout",)),
    layers="h",
)
FALCON_ONE_NORM = block(FALCON_ATTENTION, Sublayer("mlp", "input_layernorm"), post=("hidden_dropout",), layers="h")
FALCON_TWO_NORMS = block(
    Sublayer("self_attention", "ln_attn"), Sublayer("mlp", "ln_mlp"), post=("hidden_dropout",), layers="h"
)

LINEAR_OR_ATTENTION = (sequential(recurrent("linear_attn", "input_layernorm"), FEED_FORWARD), LLAMA)
RECURRENT_OR_ATTENTION = (sequential(recurrent("self_attn", "input_layernorm"), FEED_FORWARD), LLAMA)
OLMO_HYBRID = (LINEAR_OR_ATTENTION[0], POST_NORM)
JAMBA_FEED_FORWARD = Sublayer("feed_forward", "pre_ff_layernorm")
JAMBA = (sequential(MAMBA, JAMBA_FEED_FORWARD), sequential(ATTENTION, JAMBA_FEED_FORWARD))
SHORT_CONVOLUTION = Sublayer("conv", "operator_norm", recurrent=True)
LFM2_ATTENTION = Sublayer("self_attn", "operator_norm")
LFM2_FEED_FORWARD = Sublayer("feed_forward", "ffn_norm")
LFM2 = tuple(sequential(mixer, LFM2_FEED_FORWARD) for mixer in (SHORT_CONVOLUTION, LFM2_ATTENTION))
LFM3 = tuple(
    sequential(replace(mixer, post=("post_operator_norm",)), replace(LFM2_FEED_FORWARD, post=("post_ffn_norm",)))
    for mixer in (SHORT_CONVOLUTION, LFM2_ATTENTION)
)
FALCON_H1 = LayerSpec(
    (
        Step(
            "attn_hc",
            (
                replace(
                    MAMBA,
                    scale="ssm_out_multiplier",
                    renames=(("mamba_attention_mask", "attention_mask"),),
                ),
                replace(ATTENTION, attention=True, input_scale="attention_in_multiplier", scale="attn_out_multiplier"),
            ),
        ),
        Step("ffn_hc", (JAMBA_FEED_FORWARD,)),
    ),
)
NEMOTRON_FEED_FORWARD = Sublayer("mixer", "norm", cast=True)
NEMOTRON_H = (
    block(recurrent("mixer", "norm", cast=True)),
    block(NEMOTRON_FEED_FORWARD),
    LayerSpec((Step("block_hc", (NEMOTRON_FEED_FORWARD,)),)),
)
PURE_MAMBA = block(recurrent("mixer", "norm", cast=True), wide="residual_in_fp32")
RECURRENT_GEMMA = tuple(
    sequential(
        Sublayer("temporal_block", "temporal_pre_norm", own_state=own_state),
        Sublayer("mlp_block", "channel_pre_norm"),
    )
    for own_state in (False, True)
)
ERNIE_VL = sequential(ATTENTION, replace(FEED_FORWARD, attention=True))
INKLING = sequential(
    Sublayer(("self_attn", "attn_sconv"), "input_layernorm"),
    Sublayer(("mlp", "mlp_sconv"), "post_attention_layernorm", attention=True),
)
KOSMOS = sequential(
    Sublayer("self_attn", "self_attn_layer_norm", post=("dropout",)), Sublayer("ffn", "final_layer_norm")
)
NORM_AFTER = sequential(
    Sublayer("self_attn", post=("input_layernorm",)), Sublayer("mlp", post=("post_attention_layernorm",))
)

GEMMA4 = replace(SANDWICH, gain="layer_scalar")
GEMMA4_PER_LAYER_INPUT = replace(
    GEMMA4,
    steps=(
        *GEMMA4.steps,
        Step(
            "input_hc",
            (
                Sublayer(
                    ("per_layer_input_gate", "act_fn"),
                    times="per_layer_input",
                    post=("per_layer_projection", "post_per_layer_input_norm"),
                ),
            ),
        ),
    ),
)


def gpt_neox(config: Any) -> LayerSpec:
    return NEOX_PARALLEL if config.use_parallel_residual else NEOX


def stablelm(config: Any) -> LayerSpec:
    return STABLELM_PARALLEL if config.use_parallel_residual else STABLELM


def falcon(config: Any) -> LayerSpec:
    if not config.new_decoder_architecture:
        return FALCON_ONE_NORM if config.parallel_attn else FALCON_SEQUENTIAL
    return FALCON_TWO_NORMS if config.num_ln_in_parallel_attn in (None, 2) else FALCON_ONE_NORM


def opt(config: Any) -> LayerSpec:
    if not config.do_layer_norm_before:
        raise ValueError(
            "opt must have do_layer_norm_before=True; got False (OPT-350m), where the norm follows the residual "
            "addition and there is no plain residual to put streams in. Use another size of OPT."
        )
    return OPT


def bloom(config: Any) -> LayerSpec:
    if config.apply_residual_connection_post_layernorm:
        raise ValueError(
            "bloom must have apply_residual_connection_post_layernorm=False; got True, where the residual is the "
            "output of the norm. Use a model without it, such as bloom-560m."
        )
    return BLOOM


def gemma4(config: Any) -> LayerSpec:
    if config.enable_moe_block:
        raise ValueError(
            "gemma4_text must have enable_moe_block=False; got True, where router and experts are called by the "
            "layer itself on the residual. Use a dense model of the family."
        )
    return GEMMA4_PER_LAYER_INPUT if config.hidden_size_per_layer_input else GEMMA4


def molmo2(config: Any) -> LayerSpec:
    return NORM_AFTER if config.norm_after else LLAMA


def rows(names: str, row: Row) -> dict[str, Row]:
    """The same row for several model types."""
    return dict.fromkeys(names.split(), row)


SUPPORTED: dict[str, Row] = {
    **rows("llama mistral ministral ministral3 qwen2 qwen3 gemma olmo smollm3 starcoder2 nemotron glm helium", LLAMA),
    **rows("arcee bitnet cwm diffllama ernie4_5 hunyuan_v1_dense jais2 nanochat seed_oss youtu moshi", LLAMA),
    **rows("internlm3 iquestcoder", LLAMA),
    **rows("mixtral qwen2_moe qwen3_moe olmoe phimoe gpt_oss deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe", LLAMA),
    **rows("aria_text axk1 axk2 dots1 dots3_note_text ernie4_5_moe exaone_moe flint glm4_moe_lite", LLAMA),
    **rows(
        "hunyuan_v1_moe hy_v3 laguna mellum mimo_v2_flash minimax_m2 minimax_m3_vl_text solar_open glm_moe_dsa", LLAMA
    ),
    **rows("exaone sarvam_mla sarvam_moe", LLAMA),
    **rows("gemma2 gemma3_text", SANDWICH),
    "gemma4_text": ByConfig(gemma4, (GEMMA4, GEMMA4_PER_LAYER_INPUT)),
    "gemma4_unified_text": GEMMA4,
    "vaultgemma": VAULTGEMMA,
    **rows("glm4 kolibri1", GLM4),
    "afmoe": AFMOE,
    **rows("olmo2 olmo3 exaone4 flex_olmo", POST_NORM),
    **rows("granite granite_swa", GRANITE),
    "granitemoe": GRANITEMOE,
    **rows("granitemoeshared granitemoe_swa", GRANITEMOE_SHARED),
    "granitemoehybrid": GRANITEMOE_HYBRID,
    "minicpm3": MINICPM3,
    "hyperclovax": HYPERCLOVAX,
    **rows("phi3 phi4_multimodal", PHI3),
    "persimmon": PERSIMMON,
    **rows("apertus apertus1p5_text", APERTUS),
    "modernbert-decoder": MODERNBERT,
    "xlstm": XLSTM,
    "jetmoe": JETMOE,
    "llama4_text": LLAMA4,
    **rows("gpt2 gpt_bigcode gpt_neo", GPT2),
    "ctrl": CTRL,
    "opt": ByConfig(opt, (OPT,)),
    **rows("biogpt xglm", BIOGPT),
    "bloom": ByConfig(bloom, (BLOOM,)),
    "mpt": MPT,
    "dbrx": DBRX,
    "gpt_neox": ByConfig(gpt_neox, (NEOX, NEOX_PARALLEL)),
    "gpt_neox_japanese": NEOX_JAPANESE,
    **rows("gptj codegen", GPTJ),
    "phi": PHI,
    **rows("cohere cohere2 cohere2_moe cohere_compass_text", COHERE),
    "stablelm": ByConfig(stablelm, (STABLELM, STABLELM_PARALLEL)),
    "falcon": ByConfig(falcon, (FALCON_SEQUENTIAL, FALCON_ONE_NORM, FALCON_TWO_NORMS)),
    **rows("qwen3_next qwen3_5_text qwen3_5_moe_text lara_mini", LINEAR_OR_ATTENTION),
    **rows("kimi_linear bailing_hybrid", RECURRENT_OR_ATTENTION),
    "olmo_hybrid": OLMO_HYBRID,
    **rows("jamba bamba", JAMBA),
    "falcon_h1": FALCON_H1,
    "nemotron_h": NEMOTRON_H,
    **rows("lfm2 lfm2_moe", LFM2),
    "lfm3": LFM3,
    **rows("mamba mamba2 falcon_mamba", PURE_MAMBA),
    "recurrent_gemma": RECURRENT_GEMMA,
    "inkling_text": INKLING,
}


# Text models that AutoModelForCausalLM does not know by themselves.
INSIDE: dict[str, Row] = {
    **rows("cosmos3_edge_text deepseek_ocr2_text glm4v_moe_text hunyuan_vl_text mistral_large4_text", LLAMA),
    **rows(
        "qwen2_vl_text qwen2_5_vl_text qwen2_5_omni_text qwen3_vl_text qwen3_vl_moe_text qwen3_omni_moe_text", LLAMA
    ),
    **rows("paddleocr_vl_text step3p5 unlimited_ocr_text", LLAMA),
    "emu3_text_model": PERSIMMON,
    "ernie4_5_vl_moe_text": ERNIE_VL,
    **rows("glm4v_text glm_ocr_text", GLM4),
    "granite_docling_text": GRANITE,
    **rows("kosmos_2_text_model kosmos_2_5_text_model", KOSMOS),
    "molmo2_text": ByConfig(molmo2, (LLAMA, NORM_AFTER)),
    "muse_glimmer_text": SANDWICH,
}
# The row of every type of text model.
ROWS = ChainMap(SUPPORTED, INSIDE)


def around(text_model: str, names: str) -> dict[str, str]:
    """Model types of several modalities with the same text model inside."""
    return dict.fromkeys(names.split(), text_model)


def around_own(names: str) -> dict[str, str]:
    """Model types of several modalities, each with a text model of its own."""
    return {name: f"{name}_text" for name in names.split()}


# Models of several modalities, and the model type of the text model that their configuration has by default; they may
# have another one that has a row.
COMPOSITE: dict[str, str] = {
    **around_own(
        "apertus1p5 aria cohere_compass cosmos3_edge deepseek_ocr2 dots3_note ernie4_5_vl_moe gemma4 gemma4_unified"
    ),
    **around_own("glm4v_moe glm_ocr granite_docling hunyuan_vl llama4 minimax_m3_vl mistral_large4 molmo2"),
    **around_own("muse_glimmer paddleocr_vl qwen2_5_vl qwen2_vl qwen3_5_moe qwen3_vl_moe unlimited_ocr"),
    **around("llama", "deepseek_vl deepseek_vl_hybrid glmasr idefics3 janus llava llava_next"),
    **around("llama", "llava_next_video omniasr perception_lm smolvlm video_llava vipllava voxtral"),
    **around("qwen2", "fast_vlm got_ocr2 internvl llava_onevision ovis2 pp_chart2table qwen2_audio"),
    **around("qwen2", "vibevoice_asr video_llama_3"),
    **around("qwen3", "fun_asr_nano lighton_ocr moss_transcribe_diarize qianfan_ocr qwen3_asr"),
    **around("qwen3_5_text", "minicpm_ocr minicpmv4_6 minicpmv4_7 qwen3_5"),
    **around("glm4v_text", "glm46v glm4v glmga"),
    **around("opt", "blip-2 instructblip instructblipvideo"),
    **around("cohere2", "aya_vision cohere2_vision"),
    **around("gemma3_text", "gemma3"),
    **around("granite", "granite_speech granite_speech_plus"),
    **around("mistral", "idefics2 mistral3"),
    **around("nemotron_h", "nemo_speechlm nemotron_h_omni"),
    **around("qwen3_vl_text", "cosmos3_omni qwen3_vl"),
    **around("deepseek_v3", "kimi_k25"),
    **around("emu3_text_model", "emu3"),
    **around("exaone4", "exaone4_5"),
    **around("kosmos_2_text_model", "kosmos-2"),
    **around("kosmos_2_5_text_model", "kosmos-2.5"),
    **around("gemma", "paligemma"),
    **around("hyperclovax", "hyperclovax_vision_v2"),
    **around("inkling_text", "inkling_mm_model"),
    **around("lfm2", "lfm2_vl"),
    **around("lfm3", "lfm3_vl"),
    **around("persimmon", "fuyu"),
    **around("qwen2_5_omni_text", "qwen2_5_omni_thinker"),
    **around("qwen3_omni_moe_text", "qwen3_omni_moe_thinker"),
    **around("step3p5", "step3p7"),
}


def reasons(names: str, reason: str) -> dict[str, str]:
    """The same reason for several model types."""
    return dict.fromkeys(names.split(), reason)


CROSS_ATTENTION = "a decoder with cross-attention, whose keys come from an encoder"
NORM_ON_RESIDUAL = "the norm follows the residual addition, so that there is no plain residual to put streams in"
RESIDUAL_INSIDE = "the residual is added inside its attention and output modules, not by the layer"
SCALED_RESIDUAL = "the residual itself is scaled in every layer, and streams would be scaled away with it"
SEVERAL_STREAMS = "it has several residual streams already"
FLAT = "text and other modalities share one configuration, in which no text model can be told"
DRAFT_MODEL = "a draft model, which reads the states and the cache of another model"

# Everything else that AutoModelForCausalLM, AutoModelForImageTextToText and AutoModelForMultimodalLM know.
REFUSED: dict[str, str] = {
    **reasons("bart bigbird_pegasus blenderbot blenderbot-small marian mbart musicgen mvp pegasus", CROSS_ATTENTION),
    **reasons("plbart prophetnet trocr whisper", CROSS_ATTENTION),
    **reasons("blip evolla florence2 idefics mllama pix2struct pp_formulanet t5gemma2 udop", CROSS_ATTENTION),
    "vision-encoder-decoder": CROSS_ATTENTION,
    **reasons("bert bert-generation big_bird camembert data2vec-text electra ernie git", NORM_ON_RESIDUAL),
    **reasons("openai-gpt rembert roberta roc_bert roformer xlm xlm-roberta xlnet xmod", NORM_ON_RESIDUAL),
    **reasons("cpmant megatron-bert roberta-prelayernorm xlm-roberta-xl", RESIDUAL_INSIDE),
    **reasons("beam doge minimax zaya", SCALED_RESIDUAL),
    **reasons("deepseek_v4 gemma3n_text hy_v4 qwen4_exp_text", SEVERAL_STREAMS),
    **reasons("gemma3n glm5_next hy_v4_vl qwen4_exp", "its text model has several residual streams already"),
    **reasons("chameleon kyutai_speech_to_text", FLAT),
    "mistral4": "a text model without an entry of its own in AutoModelForCausalLM",
    "pi0": "it turns noise into the actions of a robot, in two models that share their attention",
    **{
        name: f"speech is made by further models, which read the states of its {name}_thinker; give that to "
        "apply_hyper_connections: model.thinker"
        for name in ("qwen2_5_omni", "qwen3_omni_moe")
    },
    "diffusion_gemma": "a model that denoises blocks of tokens, and its layers call router and experts on the residual",
    "granite4_vision": "its text model adds image features to the hidden states in the middle of its forward",
    **reasons("gemma4_assistant gemma4_unified_assistant", DRAFT_MODEL),
    "blt": "several transformers over bytes and patches, with states of different sizes",
    "dory": "the residual is the normed input, interpolated towards the update, and not a sum",
    **reasons("inkling2_loop inkling2_loop_text", "the same stack of layers runs several times over one residual"),
    "hrm_text": "two stacks of layers that run several times each, in a recurrence",
    **reasons("inkling2 inkling2_text", "its layers read the states of earlier blocks beside the residual"),
    "longcat_flash": "its expert branch starts in one residual step and is added in another",
    "muse_spark": "gates of the layer itself join residual and branch",
    "musicgen_melody": "it predicts several audio codebooks at a time, conditioned on an encoder",
    "reformer": "its layers are reversible, on two residual streams that are not kept for the backward pass",
    "rwkv": "attention and feed-forward hand one recurrent state to each other, and the first layer norms the residual",
    "shieldgemma2": "as a generative model, transformers saves it under names by which it is not loaded again",
    "voxtral_realtime": "the layer itself scales what its feed-forward reads, by the delay of the speech",
    **reasons("zamba zamba2", "its attention blocks are shared between layers and added in front of the norm"),
}
