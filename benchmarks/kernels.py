"""Every Triton kernel by itself on a GPU: its time there, and what share of a copy's bandwidth it reaches.

The time is that of the kernels which a call launches, as the profiler has it, without what it costs to launch them.

python -m benchmarks.kernels --hidden-size 2048 --tokens 16384 --streams 4
"""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measuring import DTYPES, arguments, report
from kromhc_hf.modeling.kernels_triton import read, read_backward, write, write_backward
from kromhc_hf.modeling.kernels_triton_gradients import gate_gradients, streams_gradient, weight_gradient
from kromhc_hf.modeling.kernels_triton_projection import gates
from kromhc_hf.modeling.variants import VARIANTS


def main() -> None:
    parser = arguments(__doc__, rounds=25)
    parser.set_defaults(device="cuda", dtype="bfloat16")
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--streams", type=int, nargs="+", default=[4])
    options = parser.parse_args()
    torch.manual_seed(0)
    report([row for n in options.streams for row in measure(n, options)], options)


def elements(n: int) -> dict[str, int]:
    """What each kernel reads and writes, in elements per token and C: those that read, write, and the gradients."""
    return {
        "gates": n,
        "read": n + 1,
        "write": 2 * n + 1,
        "write_backward": 3 * n + 2,
        "gate_gradients": n + 1,
        "streams_gradient": 3 * n + 1,
        "weight_gradient": n,
        "read_backward": 2 * n + 1,
    }


def measure(n: int, options: Any) -> list[dict[str, Any]]:
    tokens, width, device = options.tokens, options.hidden_size, options.device
    outputs = sum(VARIANTS["kromhc"](n).sizes)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, device=device)

    def wide(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=DTYPES[options.dtype])

    streams, grad, known = (wide(tokens, n, width) for _ in range(3))
    output, grad_input, target = wide(tokens, width), wide(tokens, width), torch.empty_like(streams)
    h_pre, h_post, grad_h_post, h_res = random(tokens, n), random(tokens, n), random(tokens, n), random(tokens, n, n)
    weight, bias, alpha = random(outputs, n * width) / 100, random(outputs), random(3)
    products, squares, logits = random(tokens, outputs), random(tokens), random(tokens, outputs - 2 * n)
    gate_inputs = (h_pre, h_post, grad_h_post, logits, products, squares, alpha, 1e-6)
    calls: dict[str, Callable[[], Any]] = {
        "gates": lambda: gates(streams, weight, bias, alpha, 1e-6),
        "read": lambda: read(streams, h_pre),
        "write": lambda: write(streams, h_res, h_post, output, True),
        "write_backward": lambda: write_backward(grad, streams, h_res, h_post, output),
        "gate_gradients": lambda: gate_gradients(grad_input, streams, *gate_inputs),
        "streams_gradient": lambda: streams_gradient(known, grad_input, streams, h_pre, weight, products, squares),
        "weight_gradient": lambda: weight_gradient(streams.flatten(1), products),
        "read_backward": lambda: read_backward(grad_input, streams, h_pre),
    }
    seconds = {name: kernel_seconds(call, options.rounds) for name, call in calls.items()}
    copy = kernel_seconds(lambda: target.copy_(streams), options.rounds)
    return [
        {
            "n": n,
            "kernel": name,
            "elements per token / C": moved,
            "ms": 1e3 * seconds[name],
            "share of copy bandwidth": copy / seconds[name] * moved / (2 * n),
        }
        for name, moved in elements(n).items()
    ]


def kernel_seconds(call: Callable[[], Any], rounds: int) -> float:
    """The mean time of all kernels that a call launches, once they are compiled."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(rounds):
            call()
        torch.cuda.synchronize()
    return sum(event.device_time_total for event in profile.key_averages()) / rounds / 1e6


if __name__ == "__main__":
    main()
