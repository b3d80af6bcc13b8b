"""Verification with one decoder layer in memory at a time."""

import json
import subprocess
import sys

import pytest
import torch
from support.sparse import sparse_llama
from support.tiny import configurations, make_model, token_ids
from transformers import AutoModelForCausalLM

from kromhc_hf import convert_checkpoint, verify_conversion
from kromhc_hf.conversion.layerwise import LayerwiseModel


# Merged experts, tuples from layers, absolute positions, sandwich norms, another path to the layers.
FAMILIES = ["llama", "mixtral", "gpt2", "gpt_neox", "bloom", "gemma3_text", "opt", "falcon_h1"]


@pytest.fixture
def pair(tmp_path):
    """A base of three layers and its converted form, in shards."""
    make_model(configurations("llama")[0]).save_pretrained(tmp_path / "base", max_shard_size="40KB")
    convert_checkpoint(tmp_path / "base", tmp_path / "out")
    return tmp_path / "base", tmp_path / "out"


@pytest.mark.parametrize("family", FAMILIES)
def test_computes_what_the_whole_model_computes(tmp_path, family):
    model = make_model(configurations(family)[0], torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    convert_checkpoint(tmp_path / "base", tmp_path / "out")
    tokens = token_ids(model.config, batch=1)
    for folder in (tmp_path / "base", tmp_path / "out"):
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")(tokens, output_hidden_states=True)
        partial = LayerwiseModel(folder)
        layers = range(len(partial.layers))
        logits, states = partial.run(tokens, layers)
        assert partial.dtype == torch.bfloat16
        assert torch.equal(logits, whole.logits.float())
        # The last of the recorded states has been through the final norm.
        for state, recorded in zip(states[:-1], whole.hidden_states[1:-1]):
            assert torch.equal(state, recorded)
        assert not [name for name, p in partial.layers.named_parameters() if not p.is_meta]
    report = verify_conversion(tmp_path / "base", tmp_path / "out", layers="all")
    assert (report.lossless, report.bitwise_equal, report.first_different_layer) == (True, True, None)
    assert report.layers == tuple(layers)
    assert report.greedy_base is None


def test_a_pickled_base(tmp_path):
    model = make_model(configurations("llama")[0])
    model.config.save_pretrained(tmp_path / "base")
    torch.save(model.state_dict(), tmp_path / "base/pytorch_model.bin")
    convert_checkpoint(tmp_path / "base", tmp_path / "out")
    assert verify_conversion(tmp_path / "base", tmp_path / "out", layers="all").bitwise_equal


@pytest.mark.parametrize("layers", ["all", range(1, 2), [0], [1, 2], (2,)], ids=str)
def test_a_slice_sees_the_layers_in_it_and_no_others(pair, tmp_path, layers):
    base, converted = pair
    assert verify_conversion(base, converted, layers=layers).lossless
    model = AutoModelForCausalLM.from_pretrained(converted)
    with torch.no_grad():
        model.model.layers[1].ffn_hc.bias[4] += 0.5  # a write weight
    model.save_pretrained(tmp_path / "changed")
    report = verify_conversion(base, tmp_path / "changed", layers=layers)
    within = layers == "all" or 1 in layers
    assert report.lossless == (not within)
    assert report.first_different_layer == (1 if within else None)
    assert report.passed == (not within)


def test_a_difference_in_the_head_is_seen(pair, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    with torch.no_grad():
        model.lm_head.weight[5] += 0.5
    model.save_pretrained(tmp_path / "changed")
    report = verify_conversion(pair[0], tmp_path / "changed", layers="all")
    assert report.first_different_layer is None
    assert not report.lossless
    assert report.max_logit_difference > 0


@pytest.mark.parametrize("layers", ["some", range(0, 4), [-1], []], ids=str)
def test_layers_that_are_not_there(pair, layers):
    with pytest.raises(
        ValueError, match=r"layers must be 'all' or positions from 0 to 2; got .* Use for example range\(3\)"
    ):
        verify_conversion(*pair, layers=layers)


def test_wrong_order(pair):
    with pytest.raises(ValueError, match="must have hyper-connections; got model_type 'llama'"):
        verify_conversion(pair[0], pair[0], layers="all")


MEASURE = """
import json, sys
import kromhc_hf
kromhc_hf.verify_conversion, kromhc_hf.KromHCForCausalLM  # torch and all else that is imported when it is needed
def kilobytes(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])
before = kilobytes("VmRSS")
report = kromhc_hf.verify_conversion(*sys.argv[1:3], layers="all", max_tokens=4)
print(json.dumps({"megabytes": (kilobytes("VmHWM") - before) / 1024, **report.to_dict()}))
"""


def test_memory_is_that_of_one_layer(tmp_path):
    """24 layers of 14 MB: a model of 340 MB, of which embeddings, head and one layer are 22 MB."""
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "vocab_size": 2000}
    size = sparse_llama(tmp_path / "base", num_layers=24, shards=6, **sizes)
    assert size > 340e6
    convert_checkpoint(tmp_path / "base", tmp_path / "out", link="hardlink")
    command = [sys.executable, "-c", MEASURE, tmp_path / "base", tmp_path / "out"]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    assert report["lossless"]
    assert report["megabytes"] < 0.5 * size / 1e6
