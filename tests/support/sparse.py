"""Checkpoints of any size that take no room on disk: safetensors headers in front of holes."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig


# 19 layers of this width hold 8.2 GB in bf16.
WIDE_LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}


def sparse_llama(folder: Path, num_layers: int = 19, shards: int = 40, **sizes: int) -> int:
    """Writes a bf16 Llama checkpoint of zeros in `shards` files; returns the bytes of its tensors."""
    config = LlamaConfig(
        num_hidden_layers=num_layers, dtype="bfloat16", tie_word_embeddings=False, **{**WIDE_LLAMA, **sizes}
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    names, weight_map, total = list(tensors), {}, 0
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        header, offset = {}, 0
        for key in names[shard::shards]:
            end = offset + tensors[key].nbytes
            header[key] = {"dtype": "BF16", "shape": list(tensors[key].shape), "data_offsets": [offset, end]}
            weight_map[key], offset = name, end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + offset)
        total += offset
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return total
