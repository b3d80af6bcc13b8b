"""The example with `HyperConnection` alone: it trains, and is the packaged GPT-2 with the same weights."""

import sys

import pytest
import torch
from test_examples import EXAMPLES, LENGTH, run_example
from transformers import GPT2Config, GPT2LMHeadModel

from kromhc_hf import apply_hyper_connections


@pytest.fixture
def nanogpt(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import nanogpt

    yield nanogpt
    del sys.modules["nanogpt"]


@pytest.mark.parametrize("init", ["paper", "identity"])
def test_it_trains_and_its_result_loads(nanogpt, tmp_path, monkeypatch, capsys, init):
    before, after, folder = run_example("nanogpt", tmp_path / "result", monkeypatch, capsys, *LENGTH, "--init", init)
    assert after < before
    model = nanogpt.NanoGPT(nanogpt.Size())
    model.load_state_dict(torch.load(folder / "nanogpt.pt"))
    assert model(torch.zeros(1, 5, dtype=torch.long)).isfinite().all()


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "separated"])
@pytest.mark.parametrize("init", ["paper", "identity"])
def test_it_is_the_packaged_gpt2_with_the_same_weights(nanogpt, init, trained):
    torch.manual_seed(0)
    size = nanogpt.Size(init=init)
    config = GPT2Config(
        vocab_size=size.vocabulary,
        n_positions=size.context,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.heads,
        bos_token_id=0,
        eos_token_id=0,
    )
    base = GPT2LMHeadModel(config).eval()
    tokens = torch.randint(0, size.vocabulary, (2, 20))
    plain = base(tokens).logits
    packaged = apply_hyper_connections(base, num_streams=size.streams, init=init)
    if trained:
        with torch.no_grad():
            for name, parameter in packaged.named_parameters():
                if "_hc." in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    model = nanogpt.NanoGPT(size)
    state = packaged.transformer.state_dict()
    # GPT-2 stores its matrices the other way round.
    matrices = {name for name in state if name.rpartition(".")[0].endswith(("c_attn", "c_proj", "c_fc"))}
    state = {name: tensor.T if name in matrices and tensor.dim() == 2 else tensor for name, tensor in state.items()}
    model.load_state_dict(state)
    expected, found = packaged(tokens).logits, model(tokens)
    # Linear layers sum in another order than GPT-2's.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * expected.abs().max().item())
    assert ((plain - expected).abs().max() < 1e-4) == (init == "identity" and not trained)
