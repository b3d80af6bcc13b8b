"""Every supported type of several modalities against transformers' own model, tiny, random, with an image or sound."""

import copy
import json
import warnings

import pytest
import torch
import transformers
from safetensors import safe_open
from support.composite import composite_inputs, make_composite, other_image
from support.tiny import separate_streams
from torch.nn.utils.parametrize import is_parametrized
from transformers import AutoConfig
from transformers.utils import logging

from kromhc_hf import KromHCConfig, apply_hyper_connections, composite_model_types, remove_hyper_connections
from kromhc_hf.modeling.families import COMPOSITE, ROWS
from kromhc_hf.modeling.layer_spec import layer_kinds


logging.set_verbosity_error()
warnings.filterwarnings("ignore")

# What transformers' own model cannot be run on, by release.
BROKEN = {"5.24": {"llama4"}}

pytestmark = pytest.mark.parametrize(
    "model_type",
    sorted(set(composite_model_types()) - BROKEN.get(transformers.__version__.rpartition(".")[0], set())),
)


def assert_equal(actual, expected, model_type):
    """Bitwise; where the family sums in another order, within the rounding of that sum in each of the layers."""
    if all(spec.exact for spec in layer_kinds(ROWS[COMPOSITE[model_type]])):
        assert torch.equal(actual, expected)
    else:
        limit = 4 * torch.finfo(expected.dtype).eps * expected.abs().max()
        assert (actual - expected).abs().max() <= limit


def states(model):
    return [(name, type(module)) for name, module in model.named_modules()], copy.deepcopy(model.state_dict())


def kinds(model):
    """The classes of all modules; torch makes a new one for each module that it parametrizes."""
    return [type(module).__name__ if is_parametrized(module) else type(module) for module in model.modules()]


def run(model, inputs, **options):
    torch.manual_seed(0)  # some towers draw noise
    return model(**inputs, use_cache=False, **options)


@torch.no_grad()
def test_logits_with_an_image_and_the_way_back(model_type):
    model = make_composite(model_type)
    inputs = composite_inputs(model_type, model)
    native = run(model, inputs, output_hidden_states=True)
    assert native.logits.isfinite().all()
    assert not torch.equal(run(model, other_image(inputs)).logits, native.logits)
    classes, tensors = states(model)
    config = model.config.to_dict()
    for options in ({"num_streams": 3}, {"num_streams": 4, "layers": "1:"}):
        apply_hyper_connections(model, **options)
        assert model.config.hc_num_streams == options["num_streams"]
        converted = run(model, inputs, output_hidden_states=True)
        assert_equal(converted.logits, native.logits, model_type)
        assert type(converted) is type(native)
        recorded, expected = (getattr(output, "hidden_states", None) or () for output in (converted, native))
        assert len(recorded) == len(expected)
        for state, plain in zip(recorded, expected):
            assert_equal(state, plain, model_type)
        remove_hyper_connections(model)
        now, present = states(model)
        assert now == classes
        assert list(present) == list(tensors)
        assert all(torch.equal(present[name], tensors[name]) for name in tensors)
        assert model.config.to_dict() == config
    assert torch.equal(run(model, inputs).logits, native.logits)


@torch.no_grad()
def test_generation_with_cache_and_left_padding(model_type):
    model = make_composite(model_type)
    inputs = padded(model_type, model)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    torch.manual_seed(0)
    expected = model.generate(**inputs, **options)
    apply_hyper_connections(model)
    torch.manual_seed(0)
    assert torch.equal(model.generate(**inputs, **options), expected)


def padded(model_type, model):
    """The first of two rows is shorter than the other."""
    inputs = composite_inputs(model_type, model)
    for name, filler in (("input_ids", model.config.get_text_config().pad_token_id or 0), ("attention_mask", 0)):
        inputs[name] = torch.cat([torch.full((2, 2), filler), inputs[name]], 1)
    inputs["input_ids"][1, :2], inputs["attention_mask"][1, :2] = 7, 1
    for name in {"mm_token_type_ids", "image_embeds_position_mask"} & inputs.keys():
        inputs[name] = torch.cat([torch.zeros(2, 2, dtype=inputs[name].dtype), inputs[name]], 1)
    return inputs


@torch.no_grad()
def test_saved_and_loaded_with_streams_apart(model_type, tmp_path):
    model = make_composite(model_type)
    inputs = composite_inputs(model_type, model)
    model.save_pretrained(tmp_path / "base")
    native = run(model, inputs).logits
    apply_hyper_connections(model)
    separate_streams(model)
    expected = run(model, inputs).logits
    assert not torch.equal(expected, native)
    model.save_pretrained(tmp_path / "streams")
    assert {name for name in stored(tmp_path / "streams") if "_hc." not in name} == stored(tmp_path / "base")
    content = json.loads((tmp_path / "streams/config.json").read_text())
    assert content["model_type"] == f"kromhc_{model_type}"
    assert not any(name.startswith("hc_") for name in content)
    loaded, info = model.auto_class.from_pretrained(tmp_path / "streams", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert kinds(loaded) == kinds(model)
    tensors = loaded.state_dict()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())
    # The same weights at another place in memory: a product of few rows may be summed in another order.
    limit = 8 * torch.finfo(expected.dtype).eps * expected.abs().max()
    assert (run(loaded.eval(), inputs).logits - expected).abs().max() <= limit
    assert KromHCConfig.from_pretrained(tmp_path / "streams").stream_options() == model.config.stream_options()
    assert AutoConfig.from_pretrained(tmp_path / "streams").hc_num_streams == 4


def stored(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_gradients_under_checkpointing(model_type):
    model = apply_hyper_connections(make_composite(model_type)).train()
    separate_streams(model)
    inputs = composite_inputs(model_type, model)
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        # granite_speech does without.
        if checkpointing and model.supports_gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        run(model, inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if "_hc." in n})
    plain, checkpointed = gradients
    assert plain
    for name, gradient in plain.items():
        assert gradient is not None, name
        assert torch.equal(checkpointed[name], gradient), name
