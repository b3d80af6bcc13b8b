"""A checkpoint must hold the tensors of its class: missing, misshapen or unknown ones are named, nothing is written."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.folders import only
from support.tiny import configurations, make_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from kromhc_hf import convert_checkpoint, inspect_checkpoints, verify_conversion
from kromhc_hf.layerwise import LayerwiseModel


def edit(folder, change):
    """Changes the tensors of a checkpoint in one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


SPOILT = {
    "norm-missing": ("llama", lambda t: t.pop("model.norm.weight"), "it lacks model.norm.weight"),
    "layer-missing": ("gpt2", lambda t: t.pop("transformer.h.1.attn.c_attn.bias"), "it lacks transformer.h.1.attn"),
    "expert-missing": (
        "mixtral",
        lambda t: t.pop(next(name for name in t if name.endswith("experts.2.w1.weight"))),
        "model.layers.0.mlp.experts.gate_up_proj",
    ),
    "other-shape": (
        "llama",
        lambda t: t.update({"lm_head.weight": torch.zeros(98, 32)}),
        r"another shape lm_head.weight \[98, 32\], not \[99, 32\]",
    ),
    "hyper-connections": (
        "llama",
        lambda t: t.update({"model.layers.0.attn_hc.bias": torch.zeros(3)}),
        "beside them model.layers.0.attn_hc.bias",
    ),
}  # fmt: skip


def test_what_the_model_does_not_have_does_no_harm(tmp_path):
    """Transformers leaves it out; run layer by layer, a tensor in a layer that nobody reads is refused."""
    make_model(configurations("gpt2")[0]).save_pretrained(tmp_path / "base")
    edit(tmp_path / "base", lambda t: t.update({"v_head.summary.weight": torch.zeros(1, 32)}))
    assert convert_checkpoint(tmp_path / "base", tmp_path / "one", verify=True).bitwise_equal
    assert verify_conversion(tmp_path / "base", tmp_path / "one", layers="all").bitwise_equal
    name = "transformer.h.1.attn.masked_bias"
    edit(tmp_path / "base", lambda t: t.update({name: torch.zeros(1)}))
    assert convert_checkpoint(tmp_path / "base", tmp_path / "two", verify=True).bitwise_equal
    assert name in load_file(tmp_path / "two/model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match=f"it has beside them {name}"):
        verify_conversion(tmp_path / "base", tmp_path / "two", layers="all")


@pytest.mark.parametrize("kind", SPOILT)
def test_an_incomplete_base(tmp_path, kind):
    family, change, message = SPOILT[kind]
    make_model(configurations(family)[0]).save_pretrained(tmp_path / "base")
    edit(tmp_path / "base", change)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "base", tmp_path / "out")
    assert only(tmp_path, "base")


def test_a_pickled_base(tmp_path):
    model = make_model(configurations("llama")[0])
    model.config.save_pretrained(tmp_path / "base")
    tensors = model.state_dict()
    del tensors["model.layers.2.mlp.up_proj.weight"]
    torch.save(tensors, tmp_path / "base/pytorch_model.bin")
    with pytest.raises(ValueError, match=r"it lacks model\.layers\.2\.mlp\.up_proj\.weight"):
        convert_checkpoint(tmp_path / "base", tmp_path / "out")
    assert only(tmp_path, "base")


def test_many_are_counted(base, tmp_path):
    edit(base, lambda tensors: [tensors.pop(name) for name in list(tensors) if "mlp" in name])
    with pytest.raises(ValueError, match="and 5 more"):
        convert_checkpoint(base, tmp_path / "out")


def test_a_tied_head_is_not_missing(tmp_path):
    config = configurations("llama")[0]
    config.tie_word_embeddings = True
    make_model(config).save_pretrained(tmp_path / "base")
    assert "lm_head.weight" not in load_file(tmp_path / "base/model.safetensors")
    report = convert_checkpoint(tmp_path / "base", tmp_path / "out", verify=True)
    assert report.lossless
    assert report.base_tensors == verify_conversion(tmp_path / "base", tmp_path / "out").base_tensors
    edit(tmp_path / "base", lambda tensors: tensors.pop("model.embed_tokens.weight"))
    with pytest.raises(ValueError, match=r"it lacks .*model\.embed_tokens\.weight"):
        convert_checkpoint(tmp_path / "base", tmp_path / "again")


@pytest.mark.parametrize("layers", [None, "all", [0]], ids=str)
def test_both_sides_of_a_verification(base, tmp_path, layers):
    convert_checkpoint(base, tmp_path / "out")
    shutil.copytree(base, tmp_path / "less")
    edit(tmp_path / "less", lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM; .* it lacks model\.layers\.2\.mlp\.up_proj\.weight"):
        verify_conversion(tmp_path / "less", tmp_path / "out", layers=layers)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "saved")
    edit(tmp_path / "saved", lambda tensors: tensors.pop("model.layers.1.attn_hc.bias"))
    with pytest.raises(ValueError, match=r"it lacks model\.layers\.1\.attn_hc\.bias"):
        verify_conversion(base, tmp_path / "saved", layers=layers)
    with pytest.raises(ValueError, match=r"it lacks model\.layers\.1\.attn_hc\.bias"):
        inspect_checkpoints([str(tmp_path / "saved")])


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_base(base, tmp_path):
    """Is compared through the quantiser, whole and layer by layer."""
    options = BitsAndBytesConfig(load_in_8bit=True)
    AutoModelForCausalLM.from_pretrained(base, quantization_config=options).save_pretrained(tmp_path / "small")
    assert convert_checkpoint(tmp_path / "small", tmp_path / "out", verify=True).lossless
    report = verify_conversion(tmp_path / "small", tmp_path / "out", layers="all")
    assert report.bitwise_equal
    assert report.lossless
    shutil.copytree(tmp_path / "small", tmp_path / "part")
    edit(tmp_path / "part", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.SCB"))
    with pytest.raises(ValueError, match=r"layer 1 of .*part lacks model\.layers\.1\.mlp\.up_proj\."):
        verify_conversion(tmp_path / "part", tmp_path / "out", layers="all")
    edit(tmp_path / "small", lambda t: [t.pop(n) for n in list(t) if n.startswith("model.layers.1.mlp.up_proj.")])
    with pytest.raises(ValueError, match=r"it lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        convert_checkpoint(tmp_path / "small", tmp_path / "again")


@pytest.mark.parametrize("method", ["gptq", "awq", "auto-round", "aqlm", "eetq", "something"])
def test_no_layers_where_a_method_unpacks_whole_models(base, method):
    config = AutoConfig.from_pretrained(base)
    config.quantization_config = {"quant_method": method, "bits": 4}
    config.save_pretrained(base)
    with pytest.raises(ValueError, match=rf"quantised \({method}\).* leave layers out"):
        LayerwiseModel(base)
