"""Run by test_kernels.py in a process of its own, like triton_interpreter.py: what "auto" finds out of Triton."""

from collections.abc import Callable

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kromhc_hf import HyperConnection
from kromhc_hf.modeling import (
    kernels,
    kernels_check,
    kernels_connect,
    kernels_triton,
    kernels_triton_gradients,
    kernels_triton_projection,
    kernels_triton_width,
)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture
def checked(monkeypatch) -> dict:
    """Lets "auto" look for Triton on a CPU, and forgets what was checked; returns what is found from now on."""
    monkeypatch.setattr(kernels, "DEVICES", ("cpu",))
    monkeypatch.setattr(kernels_check, "TOKENS", (6,))
    monkeypatch.setattr(kernels_check, "WIDTHS", {True: 32, False: 18})
    monkeypatch.setattr(kernels_check, "_faults", {})
    return kernels_check._faults


def chosen(module: HyperConnection, streams: torch.Tensor) -> str:
    variant = module.options["variant"]
    return kernels.select_connect(module.kernel, streams, torch.float32, *streams.shape[-2:], variant).__name__


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_auto_takes_kernels_that_agree(dtype: torch.dtype, checked: dict, recwarn) -> None:
    generator_state = torch.get_rng_state()
    for num_streams, hidden_size in ((4, 64), (2, 17), (7, 16)):
        module = HyperConnection(hidden_size, num_streams, variant="tbp")
        streams = torch.randn(1, 3, num_streams, hidden_size)
        torch.set_rng_state(generator_state)
        assert chosen(module, streams.to(dtype)) == "connect_triton"
        assert torch.equal(torch.get_rng_state(), generator_state)
        assert "kernel='auto' (triton)" in repr(module)
    assert list(checked.values()) == [None, None, None]
    assert not recwarn.list


def test_checks_once_for_each_kind_of_streams(checked: dict, monkeypatch) -> None:
    kinds = []
    monkeypatch.setattr(kernels_check, "_difference", lambda *kind: kinds.append(kind[1:]))
    for dtype, num_streams, hidden_size, variant in [
        (torch.float32, 4, 64, "kromhc"),
        (torch.float32, 4, 128, "kromhc"),
        (torch.float32, 4, 17, "kromhc"),
        (torch.bfloat16, 4, 64, "kromhc"),
        (torch.float32, 2, 64, "kromhc"),
        (torch.float32, 2, 64, "hc"),
    ]:
        for _ in range(2):
            streams = torch.randn(1, 3, num_streams, hidden_size).to(dtype)
            assert chosen(HyperConnection(hidden_size, num_streams, variant=variant), streams) == "connect_triton"
    assert kinds == [
        (torch.float32, 4, True, "kromhc"),
        (torch.float32, 4, False, "kromhc"),
        (torch.bfloat16, 4, True, "kromhc"),
        (torch.float32, 2, True, "kromhc"),
        (torch.float32, 2, True, "hc"),
    ]


@pytest.mark.parametrize(("variant", "num_streams"), [("mhc", 8), ("hc", 8), ("mhc_lite", 5)])
def test_check_compiles_what_the_variant_runs(variant: str, num_streams: int, checked: dict, monkeypatch) -> None:
    """Weights of more outputs than one program takes, or of one stream at a time, have launch sizes of their own."""
    launched: set = set()
    for module in (kernels_triton, kernels_triton_gradients, kernels_triton_projection):

        def watched(kernel: object, grid: object, *arguments: object, run=module.run, **constants: object) -> None:
            launched.add((kernel.__name__, *sorted(constants.items())))
            run(kernel, grid, *arguments, **constants)

        monkeypatch.setattr(module, "run", watched)
    connection, streams = HyperConnection(16, num_streams, variant=variant), torch.randn(1, 3, num_streams, 16)
    assert chosen(connection, streams) == "connect_triton"
    by_the_check = launched.copy()
    branch_input, write = connection(streams.requires_grad_())
    write(branch_input).sum().backward()
    assert launched == by_the_check


def fails(*arguments: object) -> None:
    raise RuntimeError("ptxas has failed\nand says why")


def scaled(operator: Callable, place: int | None, factor: float) -> Callable:
    """An operator with one result that is wrong."""

    def wrong(*arguments: object):
        results = operator(*arguments)
        if place is None:
            return results * factor
        return tuple(result * factor if i == place else result for i, result in enumerate(results))

    return wrong


WRONG = {
    "gates": lambda: (kernels_triton_width, "gates", scaled(kernels_triton_width.gates, 0, 1.2)),
    "read": lambda: (kernels_triton_width, "read", scaled(kernels_triton_width.read, None, 1.2)),
    "write": lambda: (kernels_connect, "write", scaled(kernels_connect.write, None, 1.2)),
    "products": lambda: (
        kernels_check,
        "TRITON",
        kernels_connect.TRITON._replace(project=scaled(kernels_connect.TRITON.project, 0, 1.2)),
    ),
    "gradient of the weight": lambda: (
        kernels_triton_width,
        "weight_gradient",
        scaled(kernels_triton_width.weight_gradient, None, 1.2),
    ),
    "gradient of alpha": lambda: (
        kernels_triton_width,
        "gate_gradients",
        scaled(kernels_triton_width.gate_gradients, 2, 1.2),
    ),
    "gradient of the streams": lambda: (
        kernels_triton_width,
        "streams_gradient",
        scaled(kernels_triton_width.streams_gradient, None, float("nan")),
    ),
    "compiler": lambda: (kernels_triton_width, "gates", fails),
}


# A fault that is larger than what the widest roundings explain, those of bfloat16, is seen in the other dtypes too.
@pytest.mark.parametrize(
    ("fault", "dtype"),
    [
        *(pytest.param(fault, torch.bfloat16, id=f"{fault}-bfloat16") for fault in WRONG),
        *(pytest.param("gates", DTYPES[name], id=f"gates-{name}") for name in ("float32", "float16")),
    ],
)
def test_auto_leaves_kernels_that_are_wrong(fault: str, dtype: torch.dtype, checked: dict, monkeypatch) -> None:
    monkeypatch.setattr(*WRONG[fault]())
    module, streams = HyperConnection(64, 4), torch.randn(1, 3, 4, 64).to(dtype)
    reason = "RuntimeError: ptxas has failed. Plain" if fault == "compiler" else "has a relative error of"
    with pytest.warns(
        RuntimeWarning, match=rf"The Triton kernels for 4 streams .*in {dtype} on cpu.*{reason}"
    ) as caught:
        found = [chosen(module, streams) for _ in range(2)]
    assert found == ["connect", "connect"]
    assert len(caught) == 1
    assert "kernel='auto' (torch)" in repr(module)
    expected = HyperConnection(64, 4, kernel="torch")
    assert torch.equal(module(streams)[0], expected(streams)[0])


def test_auto_is_checked_where_it_is_compiled(checked: dict) -> None:
    module, streams = HyperConnection(32, 4), torch.randn(1, 3, 4, 32)

    def connect(streams: torch.Tensor) -> torch.Tensor:
        branch_input, write = module(streams)
        return write(torch.tanh(branch_input))

    torch.compiler.reset()
    compiled = torch.compile(connect, fullgraph=True, backend="aot_eager")(streams)
    assert list(checked.values()) == [None]
    torch.testing.assert_close(compiled, connect(streams))


@pytest.mark.parametrize("reentrant", [False, True])
def test_auto_is_checked_inside_a_checkpoint(reentrant: bool, checked: dict, recwarn) -> None:
    """Whose hooks are there for the tensors of the model alone."""
    module, gradients = HyperConnection(32, 4), []
    streams = torch.randn(1, 3, 4, 32, requires_grad=True)

    def connect(streams: torch.Tensor) -> torch.Tensor:
        branch_input, write = module(streams)
        return write(torch.tanh(branch_input))

    for out in (checkpoint(connect, streams, use_reentrant=reentrant), connect(streams)):
        module.zero_grad()
        streams.grad = None
        out.square().sum().backward()
        gradients.append([tensor.grad.clone() for tensor in (streams, *module.parameters())])
    assert list(checked.values()) == [None]
    assert not [warning for warning in recwarn.list if issubclass(warning.category, RuntimeWarning)]
    assert all(torch.equal(found, expected) for found, expected in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_check_does_not_depend_on_the_default_dtype(dtype: torch.dtype, checked: dict) -> None:
    module, streams = HyperConnection(32, 4), torch.randn(1, 3, 4, 32)
    torch.set_default_dtype(dtype)
    try:
        with torch.inference_mode():
            assert chosen(module, streams) == "connect_triton"
    finally:
        torch.set_default_dtype(torch.float32)
    assert list(checked.values()) == [None]


def test_auto_is_checked_where_shapes_are_dynamic(checked: dict) -> None:
    module, streams = HyperConnection(32, 4), torch.randn(1, 3, 4, 32)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: module(x)[0], fullgraph=True, backend="eager", dynamic=True)(streams)
    assert list(checked.values()) == [None]
    torch.testing.assert_close(compiled, module(streams)[0])
