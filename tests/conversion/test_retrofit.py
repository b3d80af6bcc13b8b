"""The main promise on real checkpoints: with the identity init nothing changes, and then the streams can learn."""

from itertools import product

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kromhc_hf import HyperConnection, apply_hyper_connections


STORIES = ("stories15M", "stories260K", "gpt2-tinystories-1M")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def story_tokens(shared, name: str, rows: int, length: int) -> torch.Tensor:
    text = (shared / "text/tinystories/valid.txt").read_text(encoding="utf-8")[:20_000]
    ids = AutoTokenizer.from_pretrained(shared / "models" / name)(text, verbose=False)["input_ids"]
    return torch.tensor(ids[: rows * length]).view(rows, length)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_streams", [2, 4, 8, 3, 6], ids="n{}".format)
@pytest.mark.parametrize("name", STORIES)
@torch.no_grad()
def test_logits_are_the_same_bits(shared, name, num_streams, dtype):
    model = AutoModelForCausalLM.from_pretrained(shared / "models" / name, dtype=DTYPES[dtype])
    tokens = story_tokens(shared, name, 2, 100)
    before = model(tokens).logits
    apply_hyper_connections(model, num_streams=num_streams)
    assert torch.equal(model(tokens).logits, before)


@pytest.mark.parametrize("num_streams", [2, 4, 8], ids="n{}".format)
@pytest.mark.parametrize("name", STORIES)
def test_greedy_text_is_the_same(shared, name, num_streams):
    model = AutoModelForCausalLM.from_pretrained(shared / "models" / name, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / name)
    prompt = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 25, "do_sample": False, "pad_token_id": 0}
    before = model.generate(prompt, **options)
    apply_hyper_connections(model, num_streams=num_streams)
    after = model.generate(prompt, **options)
    assert torch.equal(after, before)
    assert len(tokenizer.decode(after[0], skip_special_tokens=True)) > 50


def test_known_story(shared):
    """What the checkpoint is known to say, from the converted model."""
    model = AutoModelForCausalLM.from_pretrained(shared / "models/stories15M")
    apply_hyper_connections(model, num_streams=4)
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories15M")
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=20, do_sample=False)[0], skip_special_tokens=True)
    assert text.startswith("Once upon a time, there was a little girl named Lily. She loved to play outside in")


@pytest.mark.parametrize("num_streams", [2, 4, 8], ids="n{}".format)
def test_nano_sort_still_sorts(shared, num_streams):
    model = AutoModelForCausalLM.from_pretrained(shared / "models/gpt-nano-sort")
    apply_hyper_connections(model, num_streams=num_streams)
    letters = torch.tensor(list(product(range(3), repeat=6)))
    result = model.generate(
        letters, attention_mask=torch.ones_like(letters), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    right = (result[:, 6:] == letters.sort(dim=1).values).all(dim=1)
    assert right.sum() == 729


@pytest.mark.parametrize("variant", ["kromhc", "identity"])
def test_streams_separate_in_training(shared, variant):
    model = AutoModelForCausalLM.from_pretrained(shared / "models/stories260K", dtype=torch.float32).train()
    apply_hyper_connections(model, num_streams=4, variant=variant)
    tokens = story_tokens(shared, "stories260K", 80, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for rows in tokens.split(4):
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seen = []
    last = model.model.layers[-1].ffn_hc
    last.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(tokens[:4])
    streams = seen[0]
    distances = [
        ((streams[..., i, :] - streams[..., j, :]).norm(dim=-1) / streams[..., i, :].norm(dim=-1)).mean()
        for i in range(4)
        for j in range(i)
    ]
    assert torch.stack(distances).mean() > 1e-3
    hyper_connections = [module for module in model.modules() if isinstance(module, HyperConnection)]
    assert len(hyper_connections) == 10
    for module in hyper_connections:
        pre, post, residual = module.weight.split(module.mixing.sizes)
        assert (pre.abs().amax(dim=1) > 0).all()
        assert (post.abs().amax(dim=1) > 0).all()
        # The first branch mixes n copies of the embedding and the last one mixes just before the mean is taken: a
        # doubly stochastic matrix changes neither, so only what lies between can learn to mix.
        if 0 < module.branch_index < 9 and len(residual):
            assert (residual.abs().amax(dim=1) > 0).all()
