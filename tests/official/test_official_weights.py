"""Any weights of the authors' modules and models, against their definition in reference.py."""

import math

import pytest
import torch
from support import reference

from kromhc_hf import doubly_stochastic_error, import_reference_checkpoint, import_reference_state_dict
from kromhc_hf.official.modules import official_module


def official_state(variant: str, num_streams: int, hidden_size: int) -> dict[str, torch.Tensor]:
    shapes = official_module(variant).shapes(num_streams, hidden_size)
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("variant", "num_streams"),
    [*(("kromhc", n) for n in (2, 3, 4, 6, 8, 12)), *(("mhc_lite", n) for n in (2, 3, 4))],
)
def test_any_official_parameters_map_onto_ours_exactly(variant: str, num_streams: int) -> None:
    for _ in range(5):
        state = official_state(variant, num_streams, 6)
        module = import_reference_state_dict(state, variant=variant)
        streams = torch.randn(3, num_streams, 6, dtype=torch.float64)
        branch_input, write = module(streams)
        out = write(torch.tanh(branch_input))
        expected = [reference.official_connection(variant, state, token, torch.tanh) for token in streams]
        # Float64, values of order 10.
        torch.testing.assert_close(out, torch.stack(expected), rtol=0, atol=1e-11)
        assert sum(p.numel() for p in module.parameters()) < sum(tensor.numel() for tensor in state.values())


def test_official_parameters_in_float32_stay_float32() -> None:
    state = {name: tensor.float() for name, tensor in official_state("kromhc", 4, 6).items()}
    module = import_reference_state_dict(state)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert doubly_stochastic_error(module.mappings(torch.randn(5, 7, 4, 6)).h_res) <= 4 * torch.finfo(torch.float32).eps


def test_import_names_the_tensor_of_the_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"static_alpha must be of shape \(4, 5\) in a mhc module .*got \(8,\)"):
        import_reference_state_dict(official_state("kromhc", 4, 6), variant="mhc")
    with pytest.raises(ValueError, match=r"unknown: h_post_scale, pre_branch_scale, residual_scale"):
        import_reference_state_dict(official_state("mhc", 4, 6), variant="hc")


def official_gpt_state(variant: str, num_streams: int, size: int, num_layers: int) -> dict[str, torch.Tensor]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64) / math.sqrt(shape[-1])

    state = {"transformer.wte.weight": normal(31, size), "transformer.wpe.weight": normal(16, size)}
    for layer in range(num_layers):
        block = f"transformer.h.{layer}."
        state |= {
            block + "branch_attn.0.weight": normal(size) + 1,
            block + "branch_attn.1.c_attn.weight": normal(3 * size, size),
            block + "branch_attn.1.c_proj.weight": normal(size, size),
            block + "branch_mlp.0.weight": normal(size) + 1,
            block + "branch_mlp.1.c_fc.weight": normal(4 * size, size),
            block + "branch_mlp.1.c_proj.weight": normal(size, 4 * size),
        }
        for name in ("hc_attn.", "hc_mlp."):
            state |= {block + name + k: 0.3 * v for k, v in official_state(variant, num_streams, size).items()}
    return state | {"transformer.ln_f.weight": normal(size) + 1}


@pytest.mark.parametrize("variant", ["kromhc", "mhc_lite"])
def test_official_checkpoint_gives_the_same_logits(variant: str) -> None:
    state = official_gpt_state(variant, 4, 8, 2)
    ids = torch.randint(31, (2, 9))
    expected = torch.stack([reference.official_gpt(variant, state, row, 2, 2, 4) for row in ids])
    # As stored: tied head, compiled names, and each branch a second time inside its hyper-connection.
    stored = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
    stored["_orig_mod.lm_head.weight"] = state["transformer.wte.weight"]
    for name, tensor in state.items():
        stored["_orig_mod." + name.replace("branch_attn.", "hc_attn.branch.")] = tensor
    model = import_reference_checkpoint(stored, num_heads=2, variant=variant)
    outputs = model(ids, output_hidden_states=True)
    assert type(model).__name__ == "KromHCGPT2LMHeadModel"
    assert outputs.logits.dtype == torch.float64
    # Float64, two layers of values of order 10.
    torch.testing.assert_close(outputs.logits, expected, rtol=0, atol=1e-10)
    assert {h.shape for h in outputs.hidden_states} == {(2, 9, 8)}
    # One token at a time with a cache.
    cache, steps = None, []
    for position in range(9):
        step = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        steps.append(step.logits)
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=0, atol=1e-10)


def test_official_checkpoint_refusals() -> None:
    state = official_gpt_state("kromhc", 2, 8, 1)
    with pytest.raises(ValueError, match=r"unknown: extra\.weight"):
        import_reference_checkpoint({**state, "extra.weight": torch.zeros(1)}, num_heads=2)
    with pytest.raises(
        ValueError, match=r"every tensor of a block must belong to .*got 'transformer.h.0.mixer.weight'"
    ):
        import_reference_checkpoint({**state, "transformer.h.0.mixer.weight": torch.zeros(1)}, num_heads=2)
    with pytest.raises(ValueError, match="must have hyper-connections, hc_attn and hc_mlp in every block; found none"):
        import_reference_checkpoint({k: v for k, v in state.items() if ".hc_" not in k}, num_heads=2)
