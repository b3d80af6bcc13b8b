"""Hyper-connections go with the base that they were trained on: what is recorded of it, and what is refused."""

import json
import shutil

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.tiny import configurations, make_model, token_ids
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2DoubleHeadsModel,
)

from kromhc_hf import (
    KromHCForCausalLM,
    apply_hyper_connections,
    load_hyper_connections,
    model_to_adapter,
    save_hyper_connections,
)
from kromhc_hf.conversion.loaded_base import digest


FIRST, SECOND = "a" * 40, "b" * 40
FILE = "hyper_connections.safetensors"


def description(folder) -> dict:
    with safe_open(folder / FILE, "pt") as file:
        return json.loads(file.metadata()["kromhc"])


def connected(source, **keywords):
    model = apply_hyper_connections(AutoModelForCausalLM.from_pretrained(source, **keywords), num_streams=2)
    with torch.no_grad():
        model.get_decoder().layers[0].attn_hc.bias.add_(0.3)
    return model


def change_one_value(folder, name="model.layers.1.mlp.up_proj.weight"):
    """The smallest change there is, at a place that is not one of the samples."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(torch.int32)[3, 5] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    repository = tmp_path / "hub/models--ada--base"
    for commit, seed in ((FIRST, 1), (SECOND, 2)):
        make_model(configurations("gpt2")[0], seed=seed).save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    for name, commit in (("main", FIRST), ("v2", SECOND)):
        (repository / "refs" / name).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository


@pytest.mark.parametrize(
    ("revision", "commit"), [(None, FIRST), ("v2", SECOND), (SECOND, SECOND)], ids=["main", "branch", "commit"]
)
def test_the_revision_that_was_loaded_is_recorded(cache, tmp_path, revision, commit):
    model = apply_hyper_connections(AutoModelForCausalLM.from_pretrained("ada/base", revision=revision), num_streams=2)
    save_hyper_connections(model, tmp_path / "alone")
    assert description(tmp_path / "alone")["base_revision"] == commit
    assert commit in (tmp_path / "alone/README.md").read_text()
    tokens = token_ids(model.config)
    assert torch.equal(load_hyper_connections(tmp_path / "alone")(tokens).logits, model.eval()(tokens).logits)
    other = {FIRST: "v2", SECOND: FIRST}[commit]
    with pytest.raises(ValueError, match=f"made for, ada/base at {commit}; transformer.* of ada/base is another one"):
        load_hyper_connections(tmp_path / "alone", base_revision=other)
    config = model_to_adapter(model, tmp_path / "adapter", "ada/base")
    assert (config.base_model_name_or_path, config.revision) == ("ada/base", commit)
    for call in (save_hyper_connections, model_to_adapter):
        with pytest.raises(ValueError, match="must be as it is in ada/base; transformer"):
            call(model, tmp_path / "refused", base_model="ada/base", base_revision=other)
    assert not (tmp_path / "refused").exists()


def train(model):
    with torch.no_grad():
        model.model.layers[2].input_layernorm.weight[7] += 1e-6


def merge(model):
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj"], init_lora_weights=False)
    get_peft_model(model, lora).merge_and_unload()


def resize(model):
    model.resize_token_embeddings(103)


def add_adapter(model):
    inject_adapter_in_model(LoraConfig(target_modules=["v_proj"]), model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (train, r"model.layers.2.input_layernorm.weight is another one"),
        (merge, r"model.layers.\d.self_attn.v_proj.weight is another one"),
        (resize, r"(lm_head|embed_tokens).weight is another one"),
        (add_adapter, "the model has adapters on it too"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_base_that_changed_in_memory_is_refused(base, tmp_path, change, message):
    model = connected(base)
    change(model)
    for call in (save_hyper_connections, model_to_adapter):
        with pytest.raises(ValueError, match=message):
            call(model, tmp_path / "alone", base_model=str(base))
    assert not (tmp_path / "alone").exists()


def test_another_base_is_refused_where_it_is_loaded(base, tmp_path):
    save_hyper_connections(connected(base), tmp_path / "alone")
    shutil.copytree(base, tmp_path / "other")
    assert load_hyper_connections(tmp_path / "alone", base_model=tmp_path / "other")
    change_one_value(tmp_path / "other")
    with pytest.raises(ValueError, match=r"; model.layers.1.mlp.up_proj.weight of .*other is another one. Give that"):
        load_hyper_connections(tmp_path / "alone", base_model=tmp_path / "other")
    # A file of the first version has no digests.
    content = {key: value for key, value in description(tmp_path / "alone").items() if key != "base_digests"}
    tensors = load_file(tmp_path / "alone" / FILE)
    save_file(tensors, tmp_path / "alone" / FILE, metadata={"kromhc": json.dumps(content)})
    assert isinstance(load_hyper_connections(tmp_path / "alone", base_model=tmp_path / "other"), KromHCForCausalLM)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_base_in_another_dtype(tmp_path, stored, saved):
    make_model(configurations("qwen3_moe")[0], stored).save_pretrained(tmp_path / "base")
    save_hyper_connections(connected(tmp_path / "base", dtype=saved), tmp_path / "alone")
    exact = [
        torch.float32,
        torch.bfloat16,
        *([] if (stored, saved) == (torch.float32, torch.bfloat16) else [torch.half]),
    ]
    for dtype in exact:
        assert load_hyper_connections(tmp_path / "alone", dtype=dtype).dtype == dtype


def test_a_digest_tells_order_and_value():
    tensor = torch.randn(30, 20)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert digest(tensor, dtype) == digest(tensor.t().contiguous().t(), dtype)
        assert digest(tensor, dtype) == digest(tensor.to(dtype), dtype)
        others = (tensor.flip(0), tensor.flip(1), tensor.reshape(20, 30), tensor.index_fill(1, torch.tensor([7]), 0.0))
        assert len({digest(other, dtype) for other in (tensor, *others)}) == 5


def test_a_relative_path_is_that_of_the_folder(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = connected("base")
    save_hyper_connections(model, "alone")
    assert description(tmp_path / "alone")["base_model"] == str(base)
    assert model_to_adapter(model, "adapter", "base").base_model_name_or_path == str(base)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_hyper_connections(tmp_path / "alone")
    with pytest.raises(
        FileNotFoundError, match=r"got '\.\./bas' \(there is no such folder, seen from .*elsewhere, and"
    ):
        load_hyper_connections(tmp_path / "alone", base_model="../bas")
    with pytest.raises(
        FileNotFoundError, match=r"got 'bas' \(there is no such folder, seen from .*elsewhere, and as a"
    ):
        load_hyper_connections(tmp_path / "alone", base_model="bas")
    with pytest.raises(ValueError, match="revision must be of a Hub repository; got 'v2'"):
        load_hyper_connections(tmp_path / "alone", base_revision="v2")
    with pytest.raises(ValueError, match=r"got '\./base'.*no folder seen from .*elsewhere, and no Hub id"):
        save_hyper_connections(model, "refused", base_model="./base")


def test_a_quantised_base_is_known_by_what_is_not_quantised(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    make_model(configurations("llama")[0]).save_pretrained(tmp_path / "base")
    save_hyper_connections(connected(tmp_path / "base"), tmp_path / "alone")
    from transformers import TorchAoConfig

    quantized = {"quantization_config": TorchAoConfig(torchao.Int8WeightOnlyConfig())}
    assert load_hyper_connections(tmp_path / "alone", **quantized)
    change_one_value(tmp_path / "base", "model.layers.1.mlp.up_proj.weight")
    assert load_hyper_connections(tmp_path / "alone", **quantized)
    change_one_value(tmp_path / "base", "model.embed_tokens.weight")
    with pytest.raises(ValueError, match="embed_tokens.weight of .* is another one"):
        load_hyper_connections(tmp_path / "alone", **quantized)


def test_a_base_that_is_stored_without_the_name_of_its_base_model(tmp_path):
    """As GPT-2 is on the Hub: the same tensors by shorter names."""
    make_model(configurations("gpt2")[0]).save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base/model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert short.keys() != tensors.keys()
    save_file(short, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    model = apply_hyper_connections(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    save_hyper_connections(model, tmp_path / "hc")
    tokens = token_ids(model.config)
    assert torch.equal(load_hyper_connections(tmp_path / "hc").eval()(tokens).logits, model.eval()(tokens).logits)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.add_(1)
    with pytest.raises(ValueError, match=r"h\.0\.mlp\.c_fc\.weight is another one in the model"):
        save_hyper_connections(model, tmp_path / "again")


def test_nothing_to_compare_is_no_agreement(base, tmp_path):
    model = connected(base)
    save_file({"other": torch.zeros(2)}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="must have tensors of the model to compare it with"):
        save_hyper_connections(model, tmp_path / "hc")


@pytest.mark.parametrize(
    ("auto", "task_type"),
    [
        (AutoModelForSequenceClassification, None),
        (AutoModelForTokenClassification, None),
        (AutoModelForQuestionAnswering, None),
        (AutoModel, "FEATURE_EXTRACTION"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_head_of_the_base_comes_back(tmp_path, auto, task_type):
    auto.from_config(configurations("llama")[0]).save_pretrained(tmp_path / "base")
    model = apply_hyper_connections(auto.from_pretrained(tmp_path / "base")).eval()
    with torch.no_grad():
        model.base_model.layers[0].attn_hc.bias.add_(0.3)
    save_hyper_connections(model, tmp_path / "hc")
    loaded = load_hyper_connections(tmp_path / "hc").eval()
    assert type(loaded) is type(model)
    tokens = token_ids(model.config)
    assert torch.equal(loaded(tokens)[0], model(tokens)[0])
    assert model_to_adapter(model, tmp_path / "adapter", tmp_path / "base").task_type == task_type
    adapted = PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    assert torch.equal(adapted(input_ids=tokens)[0], model(tokens)[0])


def test_a_head_that_no_auto_class_makes_is_refused(tmp_path):
    GPT2DoubleHeadsModel(configurations("gpt2")[0]).save_pretrained(tmp_path / "base")
    model = apply_hyper_connections(GPT2DoubleHeadsModel.from_pretrained(tmp_path / "base"))
    with pytest.raises(ValueError, match="must have a head that an Auto class makes"):
        save_hyper_connections(model, tmp_path / "hc")
    assert not (tmp_path / "hc").exists()


def test_a_head_of_another_version_is_not_taken_for_a_causal_one(base, tmp_path):
    save_hyper_connections(connected(base), tmp_path / "hc")
    path, content = tmp_path / "hc" / FILE, description(tmp_path / "hc")
    content["auto_class"] = "AutoModelForSpeechSeq2Seq"
    save_file(load_file(path), path, metadata={"format": "pt", "kromhc": json.dumps(content)})
    with pytest.raises(ValueError, match="must be for a base of one of .*AutoModelForCausalLM, .*SpeechSeq2Seq"):
        load_hyper_connections(tmp_path / "hc")
