"""What a Llama saves for the backward pass without streams, with all of them kept, and with blocks of them recomputed.

Per token and decoder layer: the saved tensors of the whole stack of layers, each piece of memory once, without
parameters and without the head. The time is that of a whole training step; the last column compares it, round by round,
with the step that keeps all streams.

python -m benchmarks.memory                                                       # CPU, C = 512, 8 layers, S = 256
python -m benchmarks.memory --dtype bfloat16
python -m benchmarks.memory --device cuda --dtype bfloat16 --hidden-size 2048 --layers 16 --batch 8 --sequence 2048
"""

from typing import Any

import torch

from benchmarks.measuring import FASTEST, in_turn, peak_bytes, ratio, report, saved_bytes
from benchmarks.training_step import llama_arguments, make, step
from kromhc_hf.modeling.stream_blocks import layers_of_block


def main() -> None:
    parser = llama_arguments(__doc__, rounds=9)
    parser.add_argument("--blocks", nargs="+", default=["layer", "auto", "4"], help="values of stream_recompute")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    tokens = torch.randint(options.vocabulary, (options.batch, options.sequence), device=options.device)
    plain, streams = make(None, options), make("kromhc", options)
    steps = {"no streams": step(plain, plain, tokens)}
    steps |= {name: with_blocks(streams, tokens, name) for name in ("none", *options.blocks)}
    seconds = in_turn(steps, options)
    rows, base = [], 0.0
    for name, taken in seconds.items():
        model = plain if name == "no streams" else streams
        size = layers_of_block(name, options.streams, options.layers) if model is streams else 0
        model.config.hc_stream_recompute = name if model is streams else None
        saved = saved_bytes(lambda model=model: model.model(tokens), list(model.parameters()))
        each = saved / tokens.numel() / options.layers
        base = base or each
        rows.append(
            {
                "stream_recompute": f"{name} ({size})" if size else name,
                "saved bytes": round(each),
                "times no streams": each / base,
                "peak MB": peak_bytes(steps[name], options.device) / 1e6,
                "ms": 1e3 * min(taken),
                "times none": ratio(taken, seconds["none"]),
            }
        )
    report(rows, options, FASTEST)


def with_blocks(model: Any, tokens: torch.Tensor, value: str) -> Any:
    run = step(model, model, tokens)

    def set_and_run() -> None:
        model.config.hc_stream_recompute = value
        run()

    return set_and_run


if __name__ == "__main__":
    main()
