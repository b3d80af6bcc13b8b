"""Checkpoints of models of several modalities: converted, verified with an image, run elsewhere, grown, inspected."""

import json
import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from support.composite import composite_inputs, make_composite
from support.processor import tiny_processor
from support.tiny import separate_streams
from transformers import AutoModelForImageTextToText, AutoProcessor

from kromhc_hf import (
    KromHCForImageTextToText,
    KromHCForMultimodalLM,
    convert_checkpoint,
    grow_streams,
    inspect_checkpoints,
    load_hyper_connections,
    push_checkpoint,
    save_hyper_connections,
    verify_conversion,
)
from kromhc_hf.conversion.files import CARD
from kromhc_hf.conversion.sample_image import PROCESSED, RANDOM, TEXT_ALONE


@pytest.fixture
def llava(tmp_path):
    """A tiny llava with its processor."""
    make_composite("llava").save_pretrained(tmp_path / "base")
    tiny_processor().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@torch.no_grad()
def logits(model, model_type):
    return model.eval()(**composite_inputs(model_type, model), use_cache=False).logits


def test_converted_and_verified_through_the_processor(llava, tmp_path):
    report = convert_checkpoint(llava, tmp_path / "streams", verify=True)
    assert report.lossless
    assert report.image == PROCESSED
    assert report.top1_agreement == 1
    assert report.greedy_base == report.greedy_converted is not None
    assert report.tokens > 16  # those of the image and some of text
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "streams")
    assert isinstance(model, KromHCForImageTextToText)
    assert isinstance(model, KromHCForMultimodalLM)
    assert type(AutoProcessor.from_pretrained(tmp_path / "streams")) is type(tiny_processor())
    content = json.loads((tmp_path / "streams/config.json").read_text())
    assert content["text_config"]["hc_num_streams"] == 4
    assert content["hc_conversion"]["verification"]["image"] == PROCESSED
    base = AutoModelForImageTextToText.from_pretrained(llava)
    assert torch.equal(logits(model, "llava"), logits(base, "llava"))


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [("qwen3_vl", RANDOM), ("blip-2", RANDOM), ("voxtral", RANDOM), ("fuyu", TEXT_ALONE), ("glm4v", RANDOM)],
)
def test_verified_whole_and_layer_by_layer_without_a_processor(model_type, kind, tmp_path):
    make_composite(model_type).save_pretrained(tmp_path / "base")
    convert_checkpoint(tmp_path / "base", tmp_path / "streams", num_streams=3)
    whole = verify_conversion(tmp_path / "base", tmp_path / "streams", max_tokens=12, new_tokens=4)
    layers = verify_conversion(tmp_path / "base", tmp_path / "streams", max_tokens=12, layers="all")
    assert whole.lossless
    assert layers.lossless
    assert layers.bitwise_equal
    assert whole.image == layers.image == kind
    assert layers.layers == (0, 1, 2)


def test_a_changed_layer_is_found(llava, tmp_path):
    convert_checkpoint(llava, tmp_path / "streams")
    (file,) = (tmp_path / "streams").glob("model-00001*.safetensors")
    tensors = load_file(file)
    (name,) = (name for name in tensors if "language_model" in name and "layers.1.mlp.down_proj" in name)
    tensors[name] = tensors[name] + 0.1
    save_file(tensors, file, metadata={"format": "pt"})
    report = verify_conversion(llava, tmp_path / "streams", layers="all")
    assert not report.lossless
    assert report.first_different_layer == 1
    assert not verify_conversion(llava, tmp_path / "streams").lossless


def test_what_can_only_be_run_with_an_image_that_nobody_can_make(tmp_path):
    make_composite("instructblipvideo").save_pretrained(tmp_path / "base")
    convert_checkpoint(tmp_path / "base", tmp_path / "streams")
    with pytest.raises(
        ValueError, match=r"must be run on text or on an image or sound.*base has no processor.*says: \w+"
    ):
        verify_conversion(tmp_path / "base", tmp_path / "streams")


def test_on_the_command_line(kromhc, llava, tmp_path):
    code, out, err = kromhc("convert", llava, tmp_path / "streams", "--verify")
    assert code == 0, err
    assert "with an image through the processor" in out
    code, out, _ = kromhc("verify", llava, tmp_path / "streams", "--layers", "all", "--json")
    assert code == 0
    assert json.loads(out)["image"] == PROCESSED
    code, out, err = kromhc("inspect", tmp_path / "streams")
    assert code == 0, err
    assert "kromhc_llava" in out
    code, _, err = kromhc("convert", tmp_path / "streams", tmp_path / "twice")
    assert code == 2
    assert "converted already" in err


def test_the_card_and_hyper_connections_alone(llava, tmp_path):
    convert_checkpoint(llava, tmp_path / "streams", verify=True)
    card = (tmp_path / "streams" / CARD).read_text()
    assert 'pipeline_tag: "image-text-to-text"' in card
    assert "AutoModelForImageTextToText, AutoProcessor" in card
    assert PROCESSED in card
    assert "CausalLM" not in card
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "streams")
    separate_streams(model)
    save_hyper_connections(model, tmp_path / "alone", base_model=str(llava))
    loaded = load_hyper_connections(tmp_path / "alone")
    assert isinstance(loaded, KromHCForImageTextToText)
    assert torch.equal(logits(loaded, "llava"), logits(model, "llava"))
    assert "load_hyper_connections" in (tmp_path / "alone" / CARD).read_text()


def test_pushed_and_pulled(hub, llava, tmp_path):
    convert_checkpoint(llava, tmp_path / "streams", base_model="ada/llava")
    push_checkpoint(tmp_path / "streams", "ada/streams")
    card = ModelCard.load("ada/streams")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.base_model == "ada/llava"
    model = AutoModelForImageTextToText.from_pretrained("ada/streams")
    assert isinstance(model, KromHCForImageTextToText)
    separate_streams(model)
    model.push_to_hub("ada/trained")
    loaded = KromHCForImageTextToText.from_pretrained("ada/trained")
    assert torch.equal(logits(loaded, "llava"), logits(model, "llava"))
    assert ModelCard.load("ada/trained").data.pipeline_tag == "image-text-to-text"
    assert type(AutoProcessor.from_pretrained("ada/streams")) is type(tiny_processor())


def test_grown_and_inspected(llava, tmp_path):
    convert_checkpoint(llava, tmp_path / "streams", num_streams=2)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "streams")
    separate_streams(model)
    before = logits(model, "llava")
    growth = grow_streams(model, 2)
    assert (growth.num_streams, model.config.hc_num_streams) == (4, 4)
    assert (logits(model, "llava") - before).abs().max() < 1e-2
    model.save_pretrained(tmp_path / "grown")
    (inspection,) = inspect_checkpoints([tmp_path / "grown"])
    assert inspection.num_streams == 4
    assert len(inspection.records) == 6


REMOTE = """
import sys
sys.modules["kromhc_hf"] = None  # as if it were not installed
from pathlib import Path
import torch
from transformers import AutoModelForImageTextToText

for folder in map(Path, sys.argv[1:]):
    given = torch.load(folder / "inputs")
    model = AutoModelForImageTextToText.from_pretrained(folder / "trained", trust_remote_code=True).eval()
    model.save_pretrained(folder / "again")
    reloaded = AutoModelForImageTextToText.from_pretrained(folder / "again", trust_remote_code=True).eval()
    with torch.no_grad():
        torch.save([m(**given, use_cache=False).logits for m in (model, reloaded)], folder / "found")
    ours = {type(part).__name__ for part in model.modules() if type(part).__module__.startswith("transformers_modules")}
    print(*sorted(name for name in ours if "Model" in name or "For" in name))
"""

# Every class of the package that a model has, by its type.
CLASSES = {
    "llava": "KromHCLlamaModel KromHCLlavaForConditionalGeneration KromHCLlavaModel",
    "qwen3_vl": "KromHCQwen3VLForConditionalGeneration KromHCQwen3VLModel KromHCQwen3VLTextModel",
    "blip-2": "KromHCBlip2ForConditionalGeneration KromHCOPTForCausalLM KromHCOPTModel",
}


def test_runs_where_the_package_is_not_installed(tmp_path):
    """One process for all types, which have no class in common."""
    converted = {}
    for model_type in CLASSES:
        folder, model = tmp_path / model_type, make_composite(model_type)
        model.save_pretrained(folder / "base")
        convert_checkpoint(folder / "base", folder / "streams")
        converted[model_type] = AutoModelForImageTextToText.from_pretrained(folder / "streams")
        separate_streams(converted[model_type])
        converted[model_type].save_pretrained(folder / "trained")
        torch.save(composite_inputs(model_type, model), folder / "inputs")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    # Of more threads, some would sum in another order.
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    command = [sys.executable, "-c", REMOTE, *(tmp_path / model_type for model_type in CLASSES)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == list(CLASSES.values())
    for model_type, model in converted.items():
        folder, expected = tmp_path / model_type, logits(model, model_type)
        for found in torch.load(folder / "found"):
            assert torch.equal(found, expected)
        again = AutoModelForImageTextToText.from_pretrained(folder / "again")
        assert type(again) is type(model)
        assert torch.equal(logits(again, model_type), expected)
