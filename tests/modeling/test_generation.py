"""Every way to generate, where the streams differ: the same tokens as the cache-free argmax."""

import pytest
import torch
from support.connected import connected
from support.tiny import token_ids
from transformers import AutoModelForCausalLM, StaticCache


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return connected(0.3).eval()


@pytest.fixture(scope="module")
def expected(model):
    """Twelve tokens, each the argmax of a forward over everything before it."""
    tokens = token_ids(model.config, batch=1)
    with torch.no_grad():
        for _ in range(12):
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return tokens


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_early_exit": 1},
        {"assistant_early_exit": 2},
        {"num_beams": 1, "use_cache": True},
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items()) or "default",
)
def test_greedy(model, expected, options):
    prompt = token_ids(model.config, batch=1)
    result = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0, **options)
    assert torch.equal(result, expected)
    assert model.config.num_hidden_layers == 3


def test_assisted_by_another_model(model, expected):
    torch.manual_seed(5)
    prompt = token_ids(model.config, batch=1)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(prompt, assistant_model=connected(0.3).eval(), **options), expected)


def test_beams_with_and_without_cache(model):
    prompt = token_ids(model.config)
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(prompt, **options), model.generate(prompt, use_cache=False, **options))


def test_static_cache_in_pieces(model):
    tokens = token_ids(model.config)
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        cache = StaticCache(config=model.config, max_cache_len=16)
        pieces = [model(part, past_key_values=cache).logits for part in tokens.split(5, dim=1)]
    # The attention sums over another number of keys, masked ones included.
    assert torch.allclose(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-5 * whole.abs().max().item())


def test_offloaded_to_disk(model, tmp_path):
    pytest.importorskip("accelerate")
    model.save_pretrained(tmp_path / "model")
    places = {"model.layers.1": "disk", "model.layers.2": "disk"}
    rest = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=rest | places, offload_folder=tmp_path / "offload"
    )
    tokens = token_ids(model.config)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_recorded_states_are_means_of_the_streams(model):
    seen = []
    hooks = [
        layer.attn_hc.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        states = model(token_ids(model.config), output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    assert len(states) == 4
    assert not torch.allclose(seen[2][..., 0, :], seen[2][..., 1, :], atol=1e-3)
    for state, streams in zip(states[:3], seen):
        assert torch.allclose(state, streams.mean(-2), rtol=0, atol=1e-6 * streams.abs().max().item())
