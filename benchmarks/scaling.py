"""How the cost of one hyper-connection, forward and backward, grows with streams, tokens and width.

python -m benchmarks.scaling
"""

import math
from typing import Any

import torch

from benchmarks.measuring import DTYPES, FASTEST, arguments, in_turn, ratio, report
from kromhc_hf import HyperConnection


def main() -> None:
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=[256, 512, 1024])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokens, width = options.tokens[0], options.hidden_sizes[0]
    rows = (
        measure([(n, tokens, width) for n in options.streams], options)
        + measure([(4, length, width) for length in options.tokens], options)
        + measure([(4, tokens, size) for size in options.hidden_sizes], options)
    )
    report(rows, options, FASTEST)
    if options.plot:
        plot(rows[: len(options.streams)], options.plot)


def measure(settings: list[tuple[int, int, int]], options: Any) -> list[dict[str, Any]]:
    seconds = in_turn({setting: step(*setting, options) for setting in settings}, options)
    # One stream is the plain residual connection, so n log n is compared from two on.
    first = next(setting for setting in settings if setting[0] > 1)
    rows = []
    for setting, taken in seconds.items():
        n, tokens, width = setting
        growth = n * math.log2(n) / (first[0] * math.log2(first[0])) * tokens * width / (first[1] * first[2])
        relative = ratio(taken, seconds[first])
        rows.append(
            {
                "n": n,
                "tokens": tokens,
                "C": width,
                "ms": 1e3 * min(taken),
                "ns per element of a stream": 1e9 * min(taken) / (tokens * width),
                "relative": relative,
                "of n log n": relative / growth if n > 1 else "",
            }
        )
    return rows


def step(n: int, tokens: int, width: int, options: Any) -> Any:
    module = HyperConnection(width, n, device=options.device)
    shape = (1, tokens, n, width)
    streams = torch.randn(shape, dtype=DTYPES[options.dtype], device=options.device, requires_grad=True)
    cotangent = torch.randn_like(streams)

    def run() -> None:
        branch_input, write = module(streams)
        torch.autograd.grad(write(branch_input), [streams, *module.parameters()], cotangent)

    return run


def plot(rows: list[dict[str, Any]], path: Any) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    several = [row for row in rows if row["n"] > 1]
    axes.plot([row["n"] for row in several], [row["relative"] for row in several], "o-", label="measured")
    first = several[0]["n"] * math.log2(several[0]["n"])
    ideal = [row["n"] * math.log2(row["n"]) / first for row in several]
    axes.plot([row["n"] for row in several], ideal, "--", label="n log n")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set(xlabel="streams", ylabel="cost, 2 streams = 1")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
