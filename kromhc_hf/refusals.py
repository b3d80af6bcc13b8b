"""Which model types of `AutoModelForCausalLM` are not supported, and why."""


def reasons(names: str, reason: str) -> dict[str, str]:
    """The same reason for several model types."""
    return dict.fromkeys(names.split(), reason)


CROSS_ATTENTION = "a decoder with cross-attention, whose keys come from an encoder"
NORM_ON_RESIDUAL = "the norm follows the residual addition, so that there is no plain residual to put streams in"
RESIDUAL_INSIDE = "the residual is added inside its attention and output modules, not by the layer"
SCALED_RESIDUAL = "the residual itself is scaled in every layer, and streams would be scaled away with it"
SEVERAL_STREAMS = "it has several residual streams already"
MULTI_MODAL = "a multi-modal model; hyper-connections go into a text model"
DRAFT_MODEL = "a draft model, which reads the states and the cache of another model"

# Everything else that AutoModelForCausalLM knows.
REFUSED: dict[str, str] = {
    **reasons("bart bigbird_pegasus blenderbot blenderbot-small marian mbart musicgen mvp pegasus", CROSS_ATTENTION),
    **reasons("plbart prophetnet trocr whisper", CROSS_ATTENTION),
    **reasons("bert bert-generation big_bird camembert data2vec-text electra ernie git", NORM_ON_RESIDUAL),
    **reasons("openai-gpt rembert roberta roc_bert roformer xlm xlm-roberta xlnet xmod", NORM_ON_RESIDUAL),
    **reasons("cpmant megatron-bert roberta-prelayernorm xlm-roberta-xl", RESIDUAL_INSIDE),
    **reasons("beam doge minimax zaya", SCALED_RESIDUAL),
    **reasons("deepseek_v4 gemma3n_text hy_v4 qwen4_exp_text", SEVERAL_STREAMS),
    **reasons("emu3 fuyu gemma3n got_ocr2 mllama moss_transcribe_diarize qwen4_exp", MULTI_MODAL),
    **{
        name: f"{MULTI_MODAL}, here model type {name}_text"
        for name in ("dots3_note", "gemma3", "gemma4", "gemma4_unified", "llama4", "qwen3_5", "qwen3_5_moe")
    },
    **reasons("gemma4_assistant gemma4_unified_assistant", DRAFT_MODEL),
    "blt": "several transformers over bytes and patches, with states of different sizes",
    "hrm_text": "two stacks of layers that run several times each, in a recurrence",
    "inkling2_text": "its layers read the states of earlier blocks beside the residual",
    "longcat_flash": "its expert branch starts in one residual step and is added in another",
    "musicgen_melody": "it predicts several audio codebooks at a time, conditioned on an encoder",
    "reformer": "its layers are reversible, on two residual streams that are not kept for the backward pass",
    "rwkv": "attention and feed-forward hand one recurrent state to each other, and the first layer norms the residual",
    **reasons("zamba zamba2", "its attention blocks are shared between layers and added in front of the norm"),
}
