"""Bytes that one hyper-connection reads and writes, and kernels that it launches, counted without a device.

The operations of a branch with F = identity run on meta tensors, which take the path of an accelerator without Triton,
and each is counted with all that it reads and writes. Compiled, it is what Inductor counts for the kernels that it
generates on a CPU, for fewer tokens; the Triton kernels are counted by what each of them moves.

python -m benchmarks.traffic                                            # bf16, C = 2048, 16,384 tokens
python -m benchmarks.traffic --operations --streams 4                   # which operations move how much
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._inductor import config, metrics
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.kernels import elements
from benchmarks.measuring import DTYPES, arguments, report
from kromhc_hf import HyperConnection
from kromhc_hf.modeling import kernels_eager_passes
from kromhc_hf.modeling.variants import VARIANTS


# What makes room for a tensor, or another name for one, moves nothing.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"}
# Written without having been read.
OVERWRITTEN = {"copy_", "zero_", "fill_"}
# A library puts the first term into the result before it adds a product.
COPIES_FIRST = {"addmm", "baddbmm"}
# Kernels are generated for real tensors, of this many tokens at most.
COMPILED_TOKENS = 1024
FORWARD = ("gates", "read", "write")
BACKWARD = ("write_backward", "gate_gradients", "streams_gradient", "weight_gradient")


class Traffic(TorchDispatchMode):
    """Counts what every operation under it reads and writes, in bytes, and the operations that do so, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: dict[str, int] = {}
        self.launched: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[-1]
        moved = [] if name in FREE or is_view(func) else list(passed(func, name, args, kwargs, out))
        if moved:
            self.launched[name] = self.launched.get(name, 0) + 1
            self.moved[name] = self.moved.get(name, 0) + sum(moved)
        return out


def is_view(func: Any) -> bool:
    """Whether what an operation returns is a part of what it was given."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def passed(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> Iterator[int]:
    """The bytes of every tensor that an operation reads or writes."""
    for position, argument in enumerate(func._schema.arguments):
        written = argument.alias_info is not None and argument.alias_info.is_write
        if not (written and (argument.is_out or name in OVERWRITTEN)):
            yield from touched(args[position] if position < len(args) else kwargs.get(argument.name))
    yield from touched(out)
    if name in COPIES_FIRST:
        yield from 2 * touched(out)


def touched(value: Any) -> list[int]:
    """The bytes of the tensors among these values; an expanded one has few."""
    found = []
    for tensor in tree_leaves(value):
        if isinstance(tensor, Tensor):
            count = tensor.element_size()
            for size, stride in zip(tensor.shape, tensor.stride()):
                count *= size if stride else 1
            found.append(count)
    return found


def options(given: Sequence[str] | None = None) -> Namespace:
    parser = arguments(__doc__)
    parser.set_defaults(dtype="bfloat16", device="meta")
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--streams", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--variant", choices=VARIANTS, default="kromhc")
    parser.add_argument("--operations", action="store_true", help="a row for each operation of the eager path instead")
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args(given)


def main() -> None:
    given = options()
    rows = by_operation if given.operations else by_path
    report([row for n in given.streams for row in rows(n, given)], given)


def by_path(n: int, options: Any) -> Iterator[dict[str, Any]]:
    element = DTYPES[options.dtype].itemsize * options.hidden_size * options.tokens
    counted: dict[str, tuple[Any, ...]] = {"eager": (*both(eager(n, options)), 1)}
    one = eager(n, options, lambda streams: streams[:, :, :1].expand_as(streams))
    counted["eager, one gradient for all streams"] = (*both(one), 1)
    with mock.patch.object(kernels_eager_passes, "WIDE_SUMS", ()):
        counted["eager, where products leave no fp32"] = (*both(eager(n, options)), 1)
    if not options.no_compile:
        tokens = min(options.tokens, COMPILED_TOKENS)
        counted["compiled"] = (*compiled(n, tokens, options), options.tokens / tokens)
    moved = {name: count * element for name, count in elements(n).items()}
    forward = sum(moved[name] for name in FORWARD)
    counted["Triton"] = (forward, "", forward + sum(moved[name] for name in BACKWARD), "", 1)
    for path, (forward, launches, step, step_launches, share) in counted.items():
        yield {
            "n": n,
            "path": path,
            "forward, times ideal": forward * share / ((3 * n + 2) * element),
            "launches": launches,
            "forward + backward": step * share / ((10 * n + 7) * element),
            "launches of both": step_launches,
        }


def by_operation(n: int, options: Any) -> Iterator[dict[str, Any]]:
    element = DTYPES[options.dtype].itemsize * options.hidden_size * options.tokens
    forward, step = eager(n, options)
    for name, moved in sorted(step.moved.items(), key=lambda item: -item[1]):
        yield {
            "n": n,
            "operation": name,
            "forward": forward.launched.get(name, 0),
            "forward + backward": step.launched[name],
            "elements per token / C": moved / element,
        }


def made(n: int, tokens: int, device: str, options: Any) -> tuple[HyperConnection, Tensor]:
    module = HyperConnection(options.hidden_size, n, variant=options.variant, device=device)
    shape = (1, tokens, n, options.hidden_size)
    return module, torch.zeros(shape, dtype=DTYPES[options.dtype], device=device, requires_grad=True)


def branch(module: HyperConnection) -> Callable[[Tensor], Tensor]:
    def run(streams: Tensor) -> Tensor:
        branch_input, write = module(streams)
        return write(branch_input)

    return run


def eager(n: int, options: Any, gradient: Callable[[Tensor], Tensor] = torch.empty_like) -> tuple[Traffic, Traffic]:
    """The traffic of the forward pass by itself, and of both passes."""
    module, streams = made(n, options.tokens, "meta", options)
    cotangent = gradient(streams.detach())
    with Traffic() as forward, torch.no_grad():
        branch(module)(streams)
    with Traffic() as step:
        torch.autograd.grad(branch(module)(streams), [streams, *module.parameters()], cotangent)
    return forward, step


def both(counted: tuple[Traffic, Traffic]) -> Iterator[int]:
    for traffic in counted:
        yield sum(traffic.moved.values())
        yield sum(traffic.launched.values())


def compiled(n: int, tokens: int, options: Any) -> Iterator[int]:
    """The same of kernels that Inductor generates, its calls of a library included."""
    module, streams = made(n, tokens, "cpu", options)
    cotangent = torch.zeros_like(streams)
    # Inductor counts if somebody reads its log, and only what it has not compiled before.
    counting = mock.patch("torch._inductor.compile_fx.inductor_metrics_log")
    for backward in (False, True):
        torch.compiler.reset()
        metrics.reset()
        with counting, torch.set_grad_enabled(backward), config.patch(fx_graph_cache=False):
            out = torch.compile(branch(module), fullgraph=True)(streams)
            if backward:
                torch.autograd.grad(out, [streams, *module.parameters()], cotangent)
        yield metrics.num_bytes_accessed
        yield sum(size > 0 for _, size in metrics.nodes_num_elem)


if __name__ == "__main__":
    main()
