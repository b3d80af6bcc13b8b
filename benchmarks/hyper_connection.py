"""One hyper-connection around an empty branch, against the plainest eager code for the same equations.

python -m benchmarks.hyper_connection                                   # CPU, fp32, C = 768, T = 1024
python -m benchmarks.hyper_connection --device cuda --dtype bfloat16 --hidden-size 4096 --tokens 16384
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.measuring import DTYPES, arguments, bars, eager_kromhc, in_turn, peak_bytes, ratio, report, saved_bytes
from kromhc_hf import HyperConnection
from kromhc_hf.modeling.kernels import KERNELS


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--streams", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--kernel", choices=KERNELS, default="auto")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = [row for n in options.streams for row in measure(n, options)]
    report(rows, options)
    if options.plot:
        bars(rows, lambda row: f"{row['path']} {row['pass']} n={row['n']}", "times eager", options.plot)


def made(n: int, options: Any) -> tuple[HyperConnection, torch.Tensor, torch.Tensor]:
    """A hyper-connection with random weights, streams `[1, T, n, C]` and a gradient for the new streams."""
    dtype, shape = DTYPES[options.dtype], (1, options.tokens, n, options.hidden_size)
    streams = torch.randn(shape, dtype=dtype, device=options.device, requires_grad=True)
    module = HyperConnection(options.hidden_size, n, device=options.device)
    torch.nn.init.normal_(module.weight, std=0.02)
    return module, streams, torch.randn_like(streams)


def eager(module: HyperConnection, streams: torch.Tensor) -> torch.Tensor:
    """The new streams from the equations, with F = identity."""
    wide = streams.to(module.bias.dtype)
    return eager_kromhc(dict(module.named_parameters()), wide, lambda y: y, module.eps)[1].to(streams.dtype)


def eager_step(module: HyperConnection, streams: torch.Tensor, cotangent: torch.Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(eager(module, streams), [streams, *module.parameters()], cotangent)


def measure(n: int, options: Any) -> list[dict[str, Any]]:
    module, streams, cotangent = made(n, options)
    module.kernel, parameters = options.kernel, list(module.parameters())
    target = torch.empty_like(streams)

    def default(x: torch.Tensor) -> torch.Tensor:
        branch_input, write = module(x)
        return write(branch_input)

    paths: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"eager": partial(eager, module), "default": default}
    if not options.no_compile:
        torch.compiler.reset()
        paths["compiled"] = torch.compile(default, fullgraph=True)

    def forward(path: Callable) -> Callable:
        def run() -> None:
            with torch.no_grad():
                path(streams)

        return run

    def both(path: Callable) -> Callable:
        return lambda: torch.autograd.grad(path(streams), [streams, *parameters], cotangent)

    def expanded(path: Callable) -> Callable:
        return lambda: torch.autograd.grad(path(streams), [streams, *parameters], one.expand_as(streams))

    one = cotangent[..., :1, :].contiguous()
    candidates = {"copy": lambda: target.copy_(streams.detach())}
    for name, path in paths.items():
        candidates[f"{name} forward"], candidates[f"{name} both"] = forward(path), both(path)
        candidates[f"{name} expanded"] = expanded(path)
    seconds = in_turn(candidates, options)

    size = streams.element_size() * options.tokens * options.hidden_size
    copy_rate = [2 * n * size / second for second in seconds["copy"]]
    # Elements per token and C that must move: reading and writing, and back again.
    ideal = {"forward": 3 * n + 2, "both": 7 * n + 5, "expanded": 7 * n + 5}
    passes = {
        "forward": "forward",
        "both": "forward + backward",
        "expanded": "forward + backward, one gradient for all streams",
    }
    rows = []
    for name, path in paths.items():
        for part, elements in ideal.items():
            taken = seconds[f"{name} {part}"]
            rate = [elements * size / second for second in taken]
            kept = None if part == "forward" else saved_bytes(lambda p=path: p(streams), [streams, *parameters])
            rows.append(
                {
                    "n": n,
                    "path": name,
                    "pass": passes[part],
                    "ms": 1e3 * min(taken),
                    "times eager": ratio(seconds[f"eager {part}"], taken),
                    "copies": ratio(taken, seconds["copy"]),
                    "share of copy bandwidth": ratio(rate, copy_rate),
                    "peak bytes per token": peak_bytes(candidates[f"{name} {part}"], options.device) // options.tokens,
                    "saved bytes per token": "" if kept is None else kept // options.tokens,
                }
            )
    return rows


if __name__ == "__main__":
    main()
