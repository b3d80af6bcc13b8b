"""Parity with the authors' own modules, from files with their inputs, parameters, outputs and gradients in float64."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from kromhc_hf import HyperConnection, import_reference_state_dict
from kromhc_hf.modeling import kernels_eager
from kromhc_hf.modeling.variants import make_mixing


# Outputs of order 1, float64, sums over at most 64 features: rounding stays below 1e-13.
TOLERANCE = 1e-9


@pytest.fixture(autouse=True, params=[0, 16], ids=["spans", "few"])
def path(request, monkeypatch) -> None:
    """A handful of tokens takes a path of its own, and these tests have no more: both paths are tested."""
    monkeypatch.setattr(kernels_eager, "FEW_TOKENS", request.param)


def load_golden(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """The recorded tensors, the official state dict, and the metadata of a golden file."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    state = {name.removeprefix("state."): tensor for name, tensor in tensors.items() if name.startswith("state.")}
    return tensors, state, metadata


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["kromhc_n2", "kromhc_n4", "mhc_n4", "mhc_lite_n3", "hc_n4"])
def test_imported_module_agrees_with_the_authors(shared: Path, name: str) -> None:
    golden, state, metadata = load_golden(shared / "golden" / f"{name}.safetensors")
    module = import_reference_state_dict(state, variant=metadata["variant"])
    assert isinstance(module, HyperConnection)
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    assert (module.num_streams, module.hidden_size) == (int(metadata["num_streams"]), int(metadata["hidden_size"]))

    streams = golden["streams"].requires_grad_()
    branch_input, write = module(streams)
    out = write(torch.tanh(branch_input @ golden["branch_weight"].T))
    (out * golden["cotangent"]).sum().backward()
    h_pre, h_post, h_res = module.mappings(streams)

    assert_close(branch_input, golden["branch_input"])
    assert_close(out, golden["out"])
    assert_close(h_post, golden["h_post"])
    assert_close(h_res @ streams, golden["mixed"])
    assert_close(torch.einsum("bsn,bsnc->bsc", h_pre, streams), golden["branch_input"])
    assert_close(streams.grad, golden["grad.streams"])


def test_tbp_chart_and_its_gradient(shared: Path) -> None:
    golden, _, _ = load_golden(shared / "golden" / "tbp_chart.safetensors")
    for n in (3, 4):
        t = golden[f"n{n}.t"].requires_grad_()
        h_res = make_mixing("tbp", n).matrix(t.flatten(1))
        (h_res * golden[f"n{n}.cotangent"]).sum().backward()
        assert_close(h_res, golden[f"n{n}.h_res"])
        assert_close(t.grad, golden[f"n{n}.grad.t"])


def test_import_refuses_other_tensors(shared: Path) -> None:
    _, state, _ = load_golden(shared / "golden" / "kromhc_n2.safetensors")
    with pytest.raises(ValueError, match=r"missing: static_beta; unknown: none"):
        import_reference_state_dict({name: t for name, t in state.items() if name != "static_beta"})
    with pytest.raises(ValueError, match=r"unknown: static_gamma"):
        import_reference_state_dict({**state, "static_gamma": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"variant must be one of kromhc.*; got 'transformer'"):
        import_reference_state_dict(state, variant="transformer")
