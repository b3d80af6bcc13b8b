"""The settings of a study that takes a moment, on the model that comes with the package."""

from pathlib import Path


STUDIES = Path(__file__).resolve().parents[2] / "benchmarks" / "studies"
DEMO_DATA = Path(__file__).resolve().parents[2] / "kromhc_hf" / "demo_data"
DEFAULTS = {
    "model": "gpt2-tinystories-1M",
    "text": "tinyshakespeare.txt",
    "length": 16,
    "batch": 2,
    "steps": 3,
    "eval_every": 2,
    "held_out_windows": 2,
}

BACKBONE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
FROM_SCRATCH = {
    **DEFAULTS,
    "model": None,
    "backbone": BACKBONE,
    "tokenizer": "bytes",
    "init": "paper",
    "readout": "sum",
}
