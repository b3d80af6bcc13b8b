"""Double stochasticity over depth, cost and parameters of every variant; prints tables and draws the depth picture.

python -m benchmarks.variants --plot docs/variants.png
python -m benchmarks.variants --device cuda --tokens 8192
"""

import argparse
import time

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from kromhc_hf import HyperConnection
from kromhc_hf.modeling.mixing import PAPER_RESIDUAL_LOGIT
from kromhc_hf.modeling.variants import VARIANTS, make_mixing
from kromhc_hf.parameter_counts import count_parameters


HIDDEN_SIZE, NUM_BRANCHES, DEPTH = 768, 24, 48
NUM_STREAMS = (2, 4, 8, 16)
# Standard deviation of the logits around the published initial ones, and of entries without a constraint.
SPREAD, SPREAD_OF_ENTRIES = 2.0, 0.1


def allowed(variant: str, num_streams: int) -> bool:
    try:
        make_mixing(variant, num_streams)
    except ValueError:
        return False
    return True


def marginal_error(matrices: torch.Tensor) -> float:
    """Mean over matrices of the largest |row sum - 1| or |column sum - 1|."""
    wide = matrices.double()
    errors = torch.stack([(wide.sum(-1) - 1).abs().amax(-1), (wide.sum(-2) - 1).abs().amax(-1)])
    return errors.amax(0).mean().item()


def depth_errors(variant: str, num_streams: int = 4, samples: int = 256) -> list[float]:
    """The error of the product of the first 1, 2, ... mixing matrices, for logits around the published init."""
    torch.manual_seed(0)
    mixing = make_mixing(variant, num_streams)
    spread = SPREAD_OF_ENTRIES if variant == "hc" else SPREAD
    start = mixing.initial_logits(PAPER_RESIDUAL_LOGIT)
    product, errors = torch.eye(num_streams).expand(samples, -1, -1), []
    for _ in range(DEPTH):
        product = mixing.matrix(start + spread * torch.randn(samples, mixing.num_logits)) @ product
        errors.append(marginal_error(product))
    return errors


def fastest_seconds(num_streams: int, tokens: int, device: str, rounds: int) -> dict[str, float]:
    """Fastest forward and backward of one hyper-connection around an empty branch, for every variant.

    The variants take turns, and other work on the machine can only make a run slower: the minimum is the fair figure.
    On a CPU it is the time that the process itself was given.
    """
    clock = time.process_time if device == "cpu" else time.perf_counter
    streams = torch.randn(1, tokens, num_streams, HIDDEN_SIZE, device=device, requires_grad=True)
    modules = {
        variant: HyperConnection(HIDDEN_SIZE, num_streams, variant=variant, device=device)
        for variant in VARIANTS
        if allowed(variant, num_streams)
    }
    fastest = dict.fromkeys(modules, float("inf"))
    for attempt in range(rounds + 2):
        for variant, module in modules.items():
            synchronize(device)
            start = clock()
            branch_input, write = module(streams)
            write(branch_input).sum().backward()
            synchronize(device)
            if attempt >= 2:  # the first ones warm up
                fastest[variant] = min(fastest[variant], clock() - start)
    return fastest


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def table(title: str, cell) -> None:
    """Prints a table of variants by numbers of streams; `cell(variant, num_streams)` gives the text."""
    print(f"\n| {title} | " + " | ".join(f"n={n}" for n in NUM_STREAMS) + " |")
    print("|---|" + "---|" * len(NUM_STREAMS))
    for variant in VARIANTS:
        cells = [cell(variant, n) if allowed(variant, n) else "refused" for n in NUM_STREAMS]
        print(f"| `{variant}` | " + " | ".join(cells) + " |")


def plot(errors: dict[str, list[float]], path: str) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.5))
    for variant, values in errors.items():
        axes.plot(range(1, DEPTH + 1), values, label=variant, linestyle="--" if variant == "identity" else "-")
    axes.set_yscale("symlog", linthresh=1e-8)
    axes.set(xlabel="branches", ylabel="error of row and column sums", ylim=(0, 10))
    axes.set_title("Product of the mixing matrices over depth, n = 4")
    axes.legend(loc="center right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--plot", help="where to write the picture")
    arguments = parser.parse_args()
    # Of several threads process time would be the sum, what they wait for each other included.
    torch.set_num_threads(1)

    print(f"| error of the product | 1 | 12 | 24 | {DEPTH} branches |\n|---|---|---|---|---|")
    errors = {variant: depth_errors(variant) for variant in VARIANTS}
    for variant, values in errors.items():
        print(f"| `{variant}` | " + " | ".join(f"{values[depth - 1]:.1e}" for depth in (1, 12, 24, DEPTH)) + " |")
    if arguments.plot:
        plot(errors, arguments.plot)

    table("parameters, M", lambda v, n: f"{count_parameters(HIDDEN_SIZE, n, v, num_branches=NUM_BRANCHES) / 1e6:.2f}")

    cost = {n: fastest_seconds(n, arguments.tokens, arguments.device, arguments.rounds) for n in NUM_STREAMS}
    table(
        f"time / kromhc (ms), {arguments.device}, {arguments.tokens} tokens",
        lambda v, n: f"{cost[n][v] / cost[n]['kromhc']:.2f} ({1e3 * cost[n][v]:.1f})",
    )


if __name__ == "__main__":
    main()
