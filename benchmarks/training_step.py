"""One training step of a whole Llama, with every variant and in turn with the same model without streams.

python -m benchmarks.training_step                                                     # CPU, C = 512, 8 layers, S = 256
python -m benchmarks.training_step --device cuda --dtype bfloat16 --hidden-size 2048 --layers 16 --vocabulary 128256 \\
    --batch 8 --sequence 2048 --compile --variants kromhc              # 1B class
"""

import argparse
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measuring import (
    DTYPES,
    FASTEST,
    TRAINED,
    arguments,
    as_trained,
    bars,
    in_turn,
    peak_bytes,
    ratio,
    report,
)
from kromhc_hf import HyperConnection, apply_hyper_connections
from kromhc_hf.modeling.kernels import KERNELS
from kromhc_hf.modeling.variants import VARIANTS


def main() -> None:
    parser = llama_arguments(__doc__, rounds=7)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument(
        "--stream-layers", nargs="+", default=["all"], help="layers with streams, each a slice like 5:8"
    )
    parser.add_argument("--compile", action="store_true", help="measure the compiled models as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    tokens = torch.randint(options.vocabulary, (options.batch, options.sequence), device=options.device)
    steps = {}
    with_streams = [(variant, layers) for variant in options.variants for layers in options.stream_layers]
    for variant, layers in [(None, "all"), *with_streams]:
        name = f"{variant or 'no streams'}{'' if layers == 'all' else f', layers {layers}'}"
        model = make(variant, options, layers)
        steps[name] = step(model, model, tokens)
        if options.compile:
            steps[f"{name}, compiled"] = step(model, torch.compile(model), tokens)
    seconds = in_turn(steps, options)
    rows = [
        {
            "model": name,
            "ms": 1e3 * min(taken),
            "tokens/s": tokens.numel() / min(taken),
            "times no streams": ratio(taken, seconds["no streams" + (", compiled" if "compiled" in name else "")]),
            "peak MB": peak_bytes(steps[name], options.device) / 1e6,
        }
        for name, taken in seconds.items()
    ]
    report(rows, options, FASTEST)
    if options.plot:
        bars(rows, lambda row: row["model"], "times no streams", options.plot)


def llama_arguments(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options of a benchmark on a whole Llama."""
    parser = arguments(description, rounds=rounds)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--kernel", choices=KERNELS, default="auto")
    parser.add_argument("--trained", action="store_true", help=TRAINED)
    return parser


def make(variant: str | None, options: argparse.Namespace, layers: str = "all") -> Any:
    config = LlamaConfig(
        hidden_size=options.hidden_size,
        intermediate_size=4 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 64,
        vocab_size=options.vocabulary,
        max_position_embeddings=max(2048, options.sequence),
        use_cache=False,
    )
    with torch.device(options.device):
        model = LlamaForCausalLM(config).to(DTYPES[options.dtype])
    if variant is not None:
        apply_hyper_connections(model, options.streams, variant, layers=layers)
        for module in model.modules():
            if isinstance(module, HyperConnection):
                module.kernel = options.kernel
        if options.trained:
            as_trained(model)
    return model


def step(model: Any, call: Any, tokens: torch.Tensor) -> Any:
    def run() -> None:
        call(tokens, labels=tokens).loss.backward()
        model.zero_grad()

    return run


if __name__ == "__main__":
    main()
