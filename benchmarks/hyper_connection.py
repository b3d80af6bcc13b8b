"""One hyper-connection around an empty branch, against the plainest eager code for the same equations.

python -m benchmarks.hyper_connection                                   # CPU, fp32, C = 768, T = 1024
python -m benchmarks.hyper_connection --device cuda --dtype bfloat16 --hidden-size 4096 --tokens 16384
python -m benchmarks.hyper_connection --official ../KromHC              # beside the authors' module

For the last, clone https://github.com/wz1119/KromHC, whose module needs the package einops. It is given the same
streams in its own layout, and the other paths its weights.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.measuring import (
    DTYPES,
    FASTEST,
    arguments,
    bars,
    eager_kromhc,
    in_turn,
    peak_bytes,
    ratio,
    report,
    saved_bytes,
)
from kromhc_hf import HyperConnection, import_reference_state_dict
from kromhc_hf.modeling.kernels import KERNELS


# The authors' module in a checkout of their repository.
OFFICIAL = "hyper_conn/Kromhc.py"


class Way(NamedTuple):
    """A way from streams to new streams, and what it is differentiated by."""

    run: Callable[[torch.Tensor], torch.Tensor]
    streams: torch.Tensor
    parameters: list[torch.Tensor]
    cotangent: torch.Tensor
    expanded: torch.Tensor

    def forward(self) -> None:
        with torch.no_grad():
            self.run(self.streams)

    def both(self) -> Any:
        return self.gradients(self.cotangent)

    def one_gradient(self) -> Any:
        return self.gradients(self.expanded)

    def gradients(self, cotangent: torch.Tensor) -> Any:
        return torch.autograd.grad(self.run(self.streams), [self.streams, *self.parameters], cotangent)


def main() -> None:
    parser = branch_arguments(__doc__)
    parser.add_argument("--kernel", choices=KERNELS, default="auto")
    options = parsed(parser)
    rows = [row for n in options.streams for row in measure(n, options)]
    report(rows, options, FASTEST)
    if options.plot:
        rows = [row for row in rows if row["path"] != "eager"]
        bars(rows, lambda row: f"n={row['n']} {row['path']}, {row['pass']}", "times eager", options.plot)


def branch_arguments(description: str | None) -> argparse.ArgumentParser:
    """The options of a benchmark of a single branch."""
    parser = arguments(description)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--streams", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--official", type=Path, metavar="FOLDER", help="a checkout of the authors' repository")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, checked, with threads and seed as they say."""
    options = parser.parse_args()
    if options.official and not (options.official / OFFICIAL).is_file():
        parser.error(f"--official must be a checkout with {OFFICIAL} in it; got {options.official}.")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    return options


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


def official(n: int, options: Any) -> torch.nn.Module:
    """The authors' module with random weights."""
    if str(options.official) not in sys.path:
        sys.path.append(str(options.official))
    made_by = import_module(OFFICIAL.removesuffix(".py").replace("/", ".")).KromHC
    module = made_by(n, dim=options.hidden_size, layer_index=0).to(options.device)
    for parameter in (module.dynamic_alpha_fn, module.dynamic_beta_fn):
        torch.nn.init.normal_(parameter, std=0.02)
    return module


def connected(module: torch.nn.Module, streams: torch.Tensor) -> torch.Tensor:
    branch_input, write = module(streams)
    return write(branch_input)


def official_way(module: torch.nn.Module, way: Way) -> Way:
    """The same way by the authors' module, whose streams lie side by side in the batch: here `[n, T, C]`."""
    streams, cotangent, expanded = (t.detach().squeeze(0).transpose(0, 1) for t in (way.streams, *way[-2:]))
    leaf = streams.contiguous().requires_grad_()
    theirs = Way(partial(connected, module), leaf, list(module.parameters()), cotangent.contiguous(), expanded)
    found, expected = way.both()[0].squeeze(0), theirs.both()[0].transpose(0, 1)
    # Rounded once or twice more in the dtype of the streams.
    allowed = max(1e-5, 8 * torch.finfo(found.dtype).eps) * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=allowed)
    return theirs


def made_ways(n: int, options: Any, kernel: str = "auto") -> tuple[HyperConnection, dict[str, Way]]:
    """A hyper-connection, and the ways to its results: the plainest code, its own, compiled as well, the authors'."""
    module, streams, cotangent = made(n, options)
    theirs = official(n, options) if options.official else None
    if theirs is not None:
        module = import_reference_state_dict(theirs.state_dict())
    module.kernel = kernel
    expanded = cotangent[..., :1, :].contiguous().expand_as(streams)
    runs = {"eager": partial(eager, module), "default": partial(connected, module)}
    ways = {name: Way(run, streams, list(module.parameters()), cotangent, expanded) for name, run in runs.items()}
    if theirs is not None:
        ways["official"] = official_way(theirs, ways["default"])
    if not options.no_compile:
        torch.compiler.reset()
        ways["compiled"] = ways["default"]._replace(run=partial(torch.compile(connected, fullgraph=True), module))
    return module, ways


def measure(n: int, options: Any) -> list[dict[str, Any]]:
    _, ways = made_ways(n, options, options.kernel)
    streams = ways["default"].streams
    target = torch.empty_like(streams)

    candidates: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(streams.detach())}
    for name, way in ways.items():
        candidates |= {f"{name} forward": way.forward, f"{name} both": way.both, f"{name} expanded": way.one_gradient}
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
    for name, way in ways.items():
        for part, elements in ideal.items():
            taken = seconds[f"{name} {part}"]
            rate = [elements * size / second for second in taken]
            known = [way.streams, *way.parameters]
            kept = None if part == "forward" else saved_bytes(partial(way.run, way.streams), known)
            rows.append(
                {
                    "n": n,
                    "path": name,
                    "pass": passes[part],
                    "ms": 1e3 * min(taken),
                    "times eager": ratio(seconds[f"eager {part}"], taken),
                    **({} if "official" not in ways else {"times official": ratio(seconds[f"official {part}"], taken)}),
                    "copies": ratio(taken, seconds["copy"]),
                    "share of copy bandwidth": ratio(rate, copy_rate),
                    "peak bytes per token": peak_bytes(candidates[f"{name} {part}"], options.device) // options.tokens,
                    "saved bytes per token": "" if kept is None else kept // options.tokens,
                }
            )
    return rows


if __name__ == "__main__":
    main()
