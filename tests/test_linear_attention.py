"""A model of flash-linear-attention goes the whole way, its Triton kernels interpreted on the CPU.

Needs flash-linear-attention, which `make outside` installs into an environment of its own.
"""

import copy
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from support.remote import visit_without_kromhc
from support.tiny import separate_streams
from transformers import AutoConfig, AutoModelForCausalLM

from kromhc_hf import (
    KromHCForCausalLM,
    apply_hyper_connections,
    convert_checkpoint,
    derive_family,
    freeze_backbone,
    optimizer_param_groups,
    register_family,
    remove_hyper_connections,
    unregister_family,
    verify_conversion,
)
from kromhc_hf.rows import Sublayer, sequential


pytestmark = pytest.mark.skipif(find_spec("fla") is None, reason="needs flash-linear-attention: run make outside")

# Triton measures configurations of a kernel on a device, and interprets kernels without one.
START = """
from triton.runtime.autotuner import Autotuner
Autotuner._bench = lambda *_, **__: [0.0] * 3
"""
ROW = sequential(Sublayer("attn", "attn_norm"), Sublayer("mlp", "mlp_norm"))
TOKENS = torch.tensor([[1, 5, 9, 3, 7, 2]])


@pytest.fixture(autouse=True)
def interpreted(nothing_registered):
    exec(START)
    import fla  # noqa: F401  (registers its models)


def make(model_type: str, **fields):
    unfused = dict.fromkeys(("fuse_norm", "fuse_swiglu", "fuse_cross_entropy"), False)
    # The kernels that go by chunks are not understood by the interpreter.
    size = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2, "attn_mode": "fused_recurrent"}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **unfused, **size, **fields)).eval()


def logits(model) -> torch.Tensor:
    return model(TOKENS, use_cache=False).logits


def greedy(model) -> list[int]:
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    return model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), **options)[0].tolist()


def test_a_row_that_is_read_computes_what_a_written_one_does():
    model = make("gla")
    expected, continuation = logits(model), greedy(model)
    other = copy.deepcopy(model)
    derive_family(model)
    apply_hyper_connections(model)
    assert greedy(model) == continuation
    unregister_family("gla")
    register_family("gla", ROW)
    apply_hyper_connections(other)
    assert torch.equal(logits(other), expected)
    for connected in (model, other):
        separate_streams(connected)
    assert torch.equal(logits(model), logits(other))
    assert not torch.equal(logits(model), expected)


def test_residuals_that_attend_to_layers_are_refused():
    register_family("gla", ROW)
    with pytest.raises(ValueError, match=r"layer 0 \(GLABlock\) must have no weights beyond .*'attn_res_proj'"):
        apply_hyper_connections(make("gla", attnres_block_size=2))


def test_it_is_converted_loaded_elsewhere_trained_saved_and_undone(tmp_path):
    make("gla").save_pretrained(tmp_path / "base")
    expected = logits(make("gla"))
    register_family("gla", ROW, layer_class="GLABlock")
    report = convert_checkpoint(tmp_path / "base", tmp_path / "converted", verify=True)
    assert report.bitwise_equal
    assert report.greedy_base == report.greedy_converted
    unregister_family("gla")
    assert verify_conversion(tmp_path / "base", tmp_path / "converted", trust_remote_code=True).lossless

    (tmp_path / "start").mkdir()
    (tmp_path / "start/sitecustomize.py").write_text(START)
    paths = (tmp_path / "start", Path(find_spec("fla").origin).parents[1])
    environment = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "TRITON_INTERPRET": "1"}
    away = visit_without_kromhc(tmp_path, {str(tmp_path / "converted"): tmp_path / "again"}, **environment)
    seen = away[str(tmp_path / "converted")]
    assert not seen["installed"]
    assert seen["loading"] == []
    assert seen["class"] == ["KromHCGLAForCausalLM", "transformers_modules"]
    assert seen["changed"]
    assert seen["reloaded_equal"]
    assert seen["third_equal"]

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", trust_remote_code=True)
    assert isinstance(model, KromHCForCausalLM)
    freeze_backbone(model)
    optimizer = torch.optim.AdamW(optimizer_param_groups(model, lr=1e-2))
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(TOKENS, labels=TOKENS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "trained")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", trust_remote_code=True)
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), expected)
    remove_hyper_connections(again).save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(plain).__name__ == "GLAForCausalLM"
    assert torch.equal(logits(plain), expected)
