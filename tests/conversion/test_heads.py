"""Bases with heads other than that of a causal language model: the class that is written, and what is compared."""

import json

import pytest
import torch
from support.tiny import configurations, make_model, token_ids
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2DoubleHeadsModel,
)

from kromhc_hf import convert_checkpoint, verify_conversion


HEADS = [
    ("llama", AutoModelForSequenceClassification, "KromHCLlamaForSequenceClassification", "logits"),
    ("qwen3", AutoModelForTokenClassification, "KromHCQwen3ForTokenClassification", "logits"),
    ("gpt2", AutoModelForQuestionAnswering, "KromHCGPT2ForQuestionAnswering", "start and end logits"),
    ("mistral", AutoModelForQuestionAnswering, "KromHCMistralForQuestionAnswering", "start and end logits"),
    ("gpt2", AutoModelForSequenceClassification, "KromHCGPT2ForSequenceClassification", "logits"),
    ("gpt_neox", AutoModel, "KromHCGPTNeoXModel", "last hidden state"),
    ("llama", AutoModel, "KromHCLlamaModel", "last hidden state"),
]


@pytest.mark.parametrize(("family", "auto", "name", "output"), HEADS, ids=[name for _, _, name, _ in HEADS])
def test_the_head_of_the_base_decides(tmp_path, family, auto, name, output):
    config = configurations(family)[0]
    config.id2label = {0: "bad", 1: "fair", 2: "good"}
    config.problem_type = "single_label_classification"
    base = auto.from_config(config).eval()
    base.save_pretrained(tmp_path / "base")
    report = convert_checkpoint(tmp_path / "base", tmp_path / "out", verify=True)
    assert (report.lossless, report.bitwise_equal, report.output) == (True, True, output)
    assert report.mean_kl is report.top1_agreement is report.greedy_base is None
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["architectures"] == [name]
    loaded = AutoConfig.from_pretrained(tmp_path / "out")
    assert (loaded.num_labels, loaded.id2label[2]) == (3, "good")
    assert loaded.problem_type == "single_label_classification"
    model, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    ids = token_ids(config, batch=1)
    for value, expected in zip(model(ids).to_tuple(), base(ids).to_tuple()):
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, expected)
    by_layers = verify_conversion(tmp_path / "base", tmp_path / "out", layers="all")
    assert (by_layers.lossless, by_layers.output) == (True, output)
    assert "mean KL" not in (tmp_path / "out/README.md").read_text()


def test_a_changed_head_is_seen(tmp_path):
    base = AutoModelForSequenceClassification.from_config(configurations("llama")[0])
    base.save_pretrained(tmp_path / "base")
    convert_checkpoint(tmp_path / "base", tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        model.score.weight[0] += 0.5
    model.save_pretrained(tmp_path / "changed")
    for layers in (None, "all"):
        report = verify_conversion(tmp_path / "base", tmp_path / "changed", layers=layers)
        assert not report.passed
        assert report.max_logit_difference > 0


def name_class(folder, name):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "architectures": [name]}))


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "LlamaForTokenClassification"])
def test_a_head_that_is_not_in_the_checkpoint_is_never_made_up(base, tmp_path, name):
    name_class(base, name)
    with pytest.raises(ValueError, match=rf"must hold the tensors of its class, {name}; .* it lacks score\."):
        convert_checkpoint(base, tmp_path / "out", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_bare_model_does_not_drop_a_head(base, tmp_path):
    """Of a checkpoint with a head that is called a bare model all is kept: the head can be loaded as before."""
    expected = AutoModelForCausalLM.from_pretrained(base)
    name_class(base, "LlamaModel")
    report = convert_checkpoint(base, tmp_path / "out", verify=True)
    assert (report.bitwise_equal, report.output) == (True, "last hidden state")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    tokens = token_ids(expected.config)
    assert torch.equal(loaded(tokens).logits, expected(tokens).logits)


def test_a_head_without_an_auto_class(tmp_path):
    GPT2DoubleHeadsModel(configurations("gpt2")[0]).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="must name a class of gpt2 .*GPT2LMHeadModel.* got 'GPT2DoubleHeadsModel'"):
        convert_checkpoint(tmp_path / "base", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("names", [None, ["TinyForCausalLM"]], ids=["none", "own-code"])
def test_a_causal_language_model_where_no_known_class_is_named(base, tmp_path, names):
    content = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**content, "architectures": names}))
    assert convert_checkpoint(base, tmp_path / "out", verify=True).lossless
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == ["KromHCLlamaForCausalLM"]


def test_two_heads_are_not_compared(base, tmp_path):
    make_model(configurations("llama")[0]).save_pretrained(tmp_path / "base")
    AutoModelForSequenceClassification.from_config(configurations("llama")[0]).save_pretrained(tmp_path / "reward")
    convert_checkpoint(tmp_path / "reward", tmp_path / "out")
    with pytest.raises(ValueError, match="head of KromHCForSequenceClassification, the other that of KromHCForC"):
        verify_conversion(base, tmp_path / "out")
