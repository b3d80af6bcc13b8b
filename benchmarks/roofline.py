"""What one hyper-connection cannot be faster than in plain PyTorch: its library calls, each measured by itself.

The calls are those of the default path for fp32, forward and backward, with what they allocate. Their sum, against the
plainest eager code measured in the same run, is the largest ratio that the default path can reach on this machine.
Calls that are used 0 times are what could stand in for others, and is slower.

python -m benchmarks.roofline                                           # CPU, fp32, C = 768, T = 1024
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.hyper_connection import eager_step, made
from benchmarks.measuring import arguments, in_turn, ratio, report
from kromhc_hf.modeling.kernels_eager_passes import weight_gradient
from kromhc_hf.modeling.variants import make_mixing


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--streams", type=int, nargs="+", default=[2, 4, 8])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    report([row for n in options.streams for row in measure(n, options)], options)


def measure(n: int, options: Any) -> list[dict[str, Any]]:
    module, streams, cotangent = made(n, options)
    calls = parts(n, module.weight.detach(), streams.detach().flatten(0, 1), cotangent.flatten(0, 1))

    def default() -> Any:
        branch_input, write = module(streams)
        return torch.autograd.grad(write(branch_input), [streams, *module.parameters()], cotangent)

    candidates = {"eager": eager_step(module, streams, cotangent), "default": default} | {
        name: call for name, (_, call) in calls.items()
    }
    seconds = in_turn(candidates, options)
    times = {"eager": 1, "default": 1} | {name: count for name, (count, _) in calls.items()}
    sums = [sum(times[name] * seconds[name][i] for name in calls) for i in range(options.rounds)]
    rows = [
        {"n": n, "what": name, "times used": times[name], "ms each": 1e3 * min(taken), "times faster than eager": ""}
        for name, taken in seconds.items()
    ]
    rows[1]["times faster than eager"] = ratio(seconds["eager"], seconds["default"])
    total = {"n": n, "what": "sum of the calls", "times used": 1, "ms each": 1e3 * min(sums)}
    return [*rows, total | {"times faster than eager": ratio(seconds["eager"], sums)}]


def parts(n: int, weight: Tensor, streams: Tensor, grad: Tensor) -> dict[str, tuple[int, Callable[[], Any]]]:
    """The calls by name, and how often a training step makes them; streams `[T, n, C]`."""
    tokens, _, width = streams.shape
    rows, outputs = streams.flatten(1), len(weight)
    padded = F.pad(weight, (0, 0, 0, -outputs % 8))
    h_res, h_pre = torch.rand(tokens, n, n), torch.rand(tokens, 1, n)
    output, grads, scale = torch.randn(tokens, 1, width), torch.randn(tokens, 1, outputs), torch.rand(tokens, 1)
    place, mixing = torch.empty_like(streams), make_mixing("kromhc", n)
    logits = torch.randn(tokens, mixing.num_logits)
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
        "projection, weight not filled up": (0, lambda: torch.mm(rows, weight.t())),
        "gradient of the weight in one product": (0, lambda: torch.mm(grads.squeeze(1).t(), rows)),
        "n x n with n x C, one update per stream": (0, lambda: by_stream(h_res, streams)),
        "n x n with n x C, factors one by one": (0, lambda: mixing.mix(streams, logits)),
    }


def by_stream(h_res: Tensor, streams: Tensor) -> Tensor:
    mixed = h_res[:, :, :1] * streams[:, :1]
    for j in range(1, streams.shape[1]):
        mixed.addcmul_(h_res[:, :, j : j + 1], streams[:, j : j + 1])
    return mixed


if __name__ == "__main__":
    main()
