"""What one hyper-connection cannot be faster than on this machine: its library calls, each measured by itself.

The calls are those of the default path for fp32, forward and backward, with what they allocate. Their sum, against the
plainest eager code measured in the same run, is the largest ratio that the default path can reach. Calls that are used
0 times are what could stand in for others, and is slower.

Compiled, fewer calls are left, and the passes that fuse must move at least (5n + 4) C elements per token: the new
streams and their gradient, 2n C of them, are written where no memory was before, the others at the speed of a copy.

python -m benchmarks.roofline                                           # CPU, fp32, C = 768, T = 1024
python -m benchmarks.roofline --official ../KromHC                      # beside the authors' module
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.hyper_connection import branch_arguments, made_ways, parsed
from benchmarks.measuring import FASTEST, in_turn, ratio, report
from kromhc_hf import HyperConnection
from kromhc_hf.modeling.kernels_eager_passes import weight_gradient
from kromhc_hf.modeling.mixing import filled_up


COPY, NEW_MEMORY = "copy of the streams", "streams written where no memory was before"
# Calls of a library that are left when the default path is compiled.
COMPILED = (
    "projection",
    "product n x C with C x n",
    "gradient of the streams from the projection",
    "gradient of the weight in one product",
)


def main() -> None:
    options = parsed(branch_arguments(__doc__))
    report([row for n in options.streams for row in measure(n, options)], options, FASTEST)


def measure(n: int, options: Any) -> list[dict[str, Any]]:
    module, ways = made_ways(n, options)
    streams, cotangent = ways["default"].streams.detach(), ways["default"].cotangent
    calls = parts(module, streams.flatten(0, 1), cotangent.flatten(0, 1))
    candidates = {name: way.both for name, way in ways.items()} | {name: call for name, (_, call) in calls.items()}
    seconds, rounds = in_turn(candidates, options), range(options.rounds)
    bounds = {
        "sum of the calls": [total(seconds, i, {name: count for name, (count, _) in calls.items()}) for i in rounds],
        "compiled: calls, and passes that move least": [
            total(seconds, i, dict.fromkeys(COMPILED, 1) | {COPY: (3 * n + 4) / (2 * n), NEW_MEMORY: 2}) for i in rounds
        ],
    }
    rows = []
    for name, taken in (seconds | bounds).items():
        times = calls[name][0] if name in calls else 1
        row = {"n": n, "what": name, "times used": times, "ms each": 1e3 * min(taken)}
        for other in ("eager", "official") if "official" in ways else ("eager",):
            row[f"times faster than {other}"] = "" if name in calls else ratio(seconds[other], taken)
        rows.append(row)
    return rows


def total(seconds: dict[str, list[float]], index: int, times: dict[str, float]) -> float:
    """What these candidates took in a round, each so many times."""
    return sum(count * seconds[name][index] for name, count in times.items())


def parts(module: HyperConnection, streams: Tensor, grad: Tensor) -> dict[str, tuple[int, Callable[[], Any]]]:
    """The calls by name, and how often a training step makes them; streams `[T, n, C]`."""
    weight = module.weight.detach()
    tokens, n, width = streams.shape
    rows, outputs = streams.flatten(1), len(weight)
    padded = filled_up(weight)
    h_res, h_pre = torch.rand(tokens, n, n), torch.rand(tokens, 1, n)
    output, grads, scale = torch.randn(tokens, 1, width), torch.randn(tokens, 1, outputs), torch.rand(tokens, 1)
    place, mixing = torch.empty_like(streams), module.mixing
    logits = torch.randn(tokens, mixing.num_logits)
    products, squares = torch.randn(tokens, outputs), torch.rand(tokens, 1)
    return {
        "projection": (1, lambda: torch.mm(rows, padded.t())),
        "norm": (1, lambda: torch.linalg.vector_norm(rows, dim=-1)),
        "product n x n with n x C, into new memory": (2, lambda: torch.bmm(h_res, streams)),
        "product 1 x n with n x C": (2, lambda: torch.bmm(h_pre, streams)),
        "rank one update": (2, lambda: place.addcmul_(h_pre.mT, output)),
        "product n x C with C x n": (1, lambda: torch.bmm(grad, streams.mT)),
        "product 1 x C with C x n": (2, lambda: torch.bmm(output, streams.mT)),
        "gradient of the streams from the projection": (1, lambda: place.flatten(1).addmm_(grads.squeeze(1), weight)),
        "gradient of the norm": (1, lambda: place.flatten(1).addcmul_(scale, rows)),
        "gradient of the weight": (1, lambda: weight_gradient(streams, weight, grads)),
        "mappings": (1, lambda: mappings(module, products, squares)),
        "mappings once more, and their gradients": (1, lambda: mappings(module, products, squares, h_pre, h_res)),
        "projection, weight not filled up": (0, lambda: torch.mm(rows, weight.t())),
        "gradient of the weight in one product": (0, lambda: torch.mm(grads.squeeze(1).t(), rows)),
        "n x n with n x C, one update per stream": (0, lambda: by_stream(h_res, streams)),
        "n x n with n x C, factors one by one": (0, lambda: mixing.mix(streams, logits)),
        COPY: (0, lambda: place.copy_(streams)),
        NEW_MEMORY: (0, lambda: torch.empty_like(streams).fill_(1)),
        "one gradient for all streams, written out": (0, lambda: grad[:, :1].expand_as(grad).contiguous()),
    }


def mappings(module: HyperConnection, products: Tensor, squares: Tensor, *grads: Tensor) -> Any:
    """The mappings of a hyper-connection from projected streams; with gradients of weights and `h_res`, their own."""
    leaves = [t.detach().requires_grad_(bool(grads)) for t in (products, squares, module.bias, module.alpha)]
    found = module.mixing.mappings(*leaves, products.shape[:1])
    if not grads:
        return found
    h_pre, h_res = grads
    return torch.autograd.grad(found, leaves, (h_pre.squeeze(1), h_pre.squeeze(1), h_res))


def by_stream(h_res: Tensor, streams: Tensor) -> Tensor:
    mixed = h_res[:, :, :1] * streams[:, :1]
    for j in range(1, streams.shape[1]):
        mixed.addcmul_(h_res[:, :, j : j + 1], streams[:, j : j + 1])
    return mixed


if __name__ == "__main__":
    main()
