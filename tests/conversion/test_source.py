"""Where a base may be: in a subfolder, as a variant of its weights, and what is said of sources that have none."""

import json
import re

import pytest
import torch
from huggingface_hub import HfApi
from support.folders import contents
from support.hub_client import push_base
from support.tiny import configurations, make_model, token_ids
from transformers import AutoModelForCausalLM

from kromhc_hf import convert_checkpoint, verify_conversion
from kromhc_hf.conversion.files import find_weights


def save_two_variants(folder, **options):
    """A checkpoint with the weights of two models, the second as variant fp16."""
    config = configurations("qwen2")[0]
    models = make_model(config), make_model(config)
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    models[0].save_pretrained(folder, **options)
    models[1].save_pretrained(folder, variant="fp16", **options)
    return models


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "40KB"}], ids=["single", "sharded"])
@pytest.mark.parametrize("layers", [None, "all"])
def test_a_variant_of_the_weights(tmp_path, options, layers):
    models = save_two_variants(tmp_path / "base", **options)
    for variant, model in zip((None, "fp16"), models):
        out = tmp_path / f"out-{variant}"
        report = convert_checkpoint(tmp_path / "base", out, weight_variant=variant, verify=True)
        assert report.bitwise_equal
        tokens = token_ids(model.config)
        # By the standard names: who loads it need not know of variants.
        assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(tokens).logits, model(tokens).logits)
        assert not [name for name in contents(out) if name.endswith(".json") and "fp16" in name]
        right = verify_conversion(tmp_path / "base", out, weight_variant=variant, layers=layers)
        wrong = verify_conversion(tmp_path / "base", out, weight_variant="fp16" if variant is None else None)
        assert right.lossless
        assert not wrong.lossless


def test_a_subfolder(base, tmp_path, kromhc):
    (tmp_path / "repository").mkdir()
    base.rename(tmp_path / "repository/policy")
    make_model(configurations("gpt2")[0]).save_pretrained(tmp_path / "repository")
    code, printed, _ = kromhc("convert", tmp_path / "repository", tmp_path / "out", "--subfolder", "policy", "--json")
    assert code == 0
    assert json.loads(printed)["bitwise_equal"]
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "kromhc_llama"
    report = verify_conversion(tmp_path / "repository", tmp_path / "out", subfolder="policy")
    assert report.bitwise_equal
    for wrong in ("value", "policy/model"):
        with pytest.raises(FileNotFoundError, match=rf"subfolder must be .*got '{wrong}', and there are policy"):
            convert_checkpoint(tmp_path / "repository", tmp_path / "again", subfolder=wrong)
    for outside in ("..", "policy/../..", "/"):
        with pytest.raises(ValueError, match="subfolder must be a path inside the source"):
            convert_checkpoint(tmp_path / "repository", tmp_path / "again", subfolder=outside)
    assert not (tmp_path / "again").exists()


def test_a_subfolder_and_a_variant_on_the_hub(hub, tmp_path):
    """Nothing else of the repository is downloaded, and it is not named as the base: by its id alone it is another."""
    models = save_two_variants(tmp_path / "base")
    make_model(configurations("gpt2")[0]).save_pretrained(tmp_path / "other")
    api = HfApi()
    api.create_repo("ada/mixed")
    api.upload_folder(repo_id="ada/mixed", folder_path=tmp_path / "other")
    api.upload_folder(repo_id="ada/mixed", folder_path=tmp_path / "base", path_in_repo="policy")
    with pytest.raises(
        FileNotFoundError, match=r"subfolder must be one of ada/mixed; got 'value', and there are policy"
    ):
        convert_checkpoint("ada/mixed", tmp_path / "out", subfolder="value")
    convert_checkpoint("ada/mixed", tmp_path / "out", subfolder="policy", weight_variant="fp16", verify=True)
    tokens = token_ids(models[1].config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(tokens).logits, models[1](tokens).logits)
    assert "base_model" not in loaded.config.hc_conversion
    weights = {path.name for path in (tmp_path / "cache").rglob("*.safetensors") if path.parent.name == "policy"}
    assert weights == {"model.fp16.safetensors"}
    assert not [path for path in (tmp_path / "cache").rglob("*.safetensors") if path.parent.name != "policy"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tiny.Q4_K_M.gguf"], r"but tiny.Q4_K_M.gguf \(GGUF weights\). Load them .*gguf_file='tiny.Q4_K_M.gguf'"),
        (
            ["model.fp16.safetensors"],
            "but the variant fp16. A base is converted and verified with weight_variant='fp16', --weight-variant fp16",
        ),
        (["pytorch_model.bin.index.bf16.json"], "but the variant bf16. A base is"),
        (["flax_model.msgpack", "model.onnx"], r"but flax_model.msgpack \(Flax weights\)"),
        (["consolidated.safetensors"], r"but consolidated.safetensors \(a name by which transformers reads no"),
        (
            ["policy/config.json"],
            "but there is a checkpoint in policy. A base is converted and verified with subfolder='policy'",
        ),
        ([], "Save the model with save_pretrained first"),
    ],
    ids=lambda value: "+".join(value) or "nothing" if isinstance(value, list) else "",
)
@pytest.mark.parametrize("config", [True, False], ids=["config", "no-config"])
def test_what_is_there_is_named(base, tmp_path, kromhc, names, message, config):
    (base / "model.safetensors").unlink()
    if not config:
        (base / "config.json").unlink()
    for name in names:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(b"GGUF")
    with pytest.raises(FileNotFoundError, match=message):
        convert_checkpoint(base, tmp_path / "out")
    code, _, printed = kromhc("convert", base, tmp_path / "out")
    assert code == 2
    assert re.search(message.replace(" ", r"\s"), printed)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_what_is_there_is_named_on_the_hub(hub, tmp_path):
    api = HfApi()
    for repository, name in (("ada/gguf", "tiny.gguf"), ("ada/tf", "tf_model.h5"), ("ada/empty", "notes.md")):
        api.create_repo(repository)
        api.upload_file(path_or_fileobj=b"GGUF", path_in_repo=name, repo_id=repository)
    for repository, message in {
        "ada/gguf": r"ada/gguf has none but tiny.gguf \(GGUF weights\)",
        "ada/tf": r"ada/tf has none but tf_model.h5 \(TensorFlow weights\)",
        "ada/empty": r"ada/empty has none. Save the model",
    }.items():
        with pytest.raises(FileNotFoundError, match=message):
            convert_checkpoint(repository, tmp_path / "out")


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "40KB"}], ids=["single", "sharded"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_one_set_of_weights_is_downloaded(hub, tmp_path, kromhc, options, variant):
    """Of the same model by another name, as another variant or in another folder, nothing; of its row, no weights."""
    save_two_variants(tmp_path / "base", **options)
    for extra in ("consolidated.safetensors", "original/model.safetensors"):
        (tmp_path / "base" / extra).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / extra).write_bytes(b"large")
    push_base(tmp_path / "base")
    code, out, _ = kromhc("families", "ada/base", "--json")
    assert (code, json.loads(out)[0]["model_type"]) == (0, "qwen2")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    convert_checkpoint("ada/base", tmp_path / "out", weight_variant=variant)
    found = {path.name for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert len(found) == (1 if not options else len(find_weights(tmp_path / "base", {}, variant).files))
    assert all((".fp16" in name) == (variant is not None) for name in found)


def test_an_adapter_alone_is_called_one(tmp_path, hub):
    """Whatever its weights are called, and without a config.json."""
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "lora/adapter_model.bin").write_bytes(b"")
    HfApi().create_repo("ada/lora")
    HfApi().upload_folder(repo_id="ada/lora", folder_path=tmp_path / "lora")
    for source in (tmp_path / "lora", "ada/lora"):
        with pytest.raises(ValueError, match="has an adapter .*Merge the adapter first"):
            convert_checkpoint(source, tmp_path / "out")
