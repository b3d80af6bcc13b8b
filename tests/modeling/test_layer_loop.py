"""What models do between their layers: read from their source, image features on every stream, the rest refused."""

import pytest
import torch
from peft import get_peft_model
from support.adapters import adapter_config
from support.composite import composite_inputs, make_composite
from support.tiny import separate_streams
from torch import nn
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextModel
from transformers.models.granite4_vision.modeling_granite4_vision import Granite4VisionTextModel
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from kromhc_hf import adapter_to_model, apply_hyper_connections
from kromhc_hf.modeling.families import COMPOSITE
from kromhc_hf.modeling.layer_loop import check_between_layers, layer_loops, methods_for_streams


DEEPSTACK = sorted(
    name for name in COMPOSITE if name in ("cohere_compass", "cosmos3_omni", "granite_docling") or "qwen3_vl" in name
)


class Model(nn.Module):
    def add_features(self, hidden_states, mask, features):
        """Adds."""
        mask = mask.to(hidden_states.device)
        features = features.to(hidden_states.device, hidden_states.dtype)
        hidden_states = hidden_states.clone()
        local = hidden_states[mask, :].clone() + features
        hidden_states[mask, :] = local
        return hidden_states

    def scale(self, hidden_states, factor):
        return hidden_states * factor

    def add_to_others(self, hidden_states, mask, features):
        hidden_states[mask, :] = hidden_states[~mask, :] + features
        return hidden_states

    def add_a_function(self, hidden_states, features):
        return hidden_states + hidden_states.norm() * features

    def select(self, hidden_states, count):
        if hidden_states.shape[1] > count:
            hidden_states = hidden_states[:, -count:, :]
        return hidden_states

    def select_features(self, hidden_states, count):
        hidden_states = hidden_states[:, :, :count]
        return hidden_states


class Plain(Model):
    def forward(self, hidden_states):
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


class First(Model):
    def forward(self, x, kept=()):
        for _, (layer, mask) in enumerate(zip(self.layers[:2], self.masks)):
            outputs = layer(x, mask)
            x = outputs[0] if isinstance(outputs, tuple) else outputs
            kept += (x,)
        return x


class Adding(Model):
    def forward(self, hidden_states, mask, features):
        for layer in self.layers:
            hidden_states, _ = layer(hidden_states)
            hidden_states = self.add_features(hidden_states, mask, features)
        return hidden_states


class Selecting(Model):
    def forward(self, hidden_states, count):
        for layer in self.layers:
            hidden_states = self.select(hidden_states, count)
            hidden_states = layer(hidden_states)
        return hidden_states


class Inline(Model):
    def forward(self, hidden_states, features):
        for layer in self.layers:
            hidden_states = layer(hidden_states)
            hidden_states = hidden_states + features
        return hidden_states


class Augmented(Model):
    def forward(self, hidden_states, features):
        for layer in self.layers:
            hidden_states = layer(hidden_states)
            hidden_states += features
        return hidden_states


class InPlace(Model):
    def forward(self, hidden_states, features):
        for layer in self.layers:
            hidden_states = layer(hidden_states)
            hidden_states[:, :2].add_(features)
        return hidden_states


class Indexed(Model):
    def forward(self, hidden_states, features):
        for layer in self.layers:
            hidden_states = layer(hidden_states)
            hidden_states[:, 0] = features
        return hidden_states


class Second(Model):
    def forward(self, hidden_states):
        for layer in self.layers:
            _, hidden_states = layer(hidden_states)
        return hidden_states


class Scaling(Model):
    def forward(self, hidden_states):
        for layer in self.layers:
            hidden_states = self.scale(layer(hidden_states), 2)
        return hidden_states


class AddingToOthers(Model):
    def forward(self, hidden_states, mask, features):
        for layer in self.layers:
            hidden_states = layer(hidden_states)
            hidden_states = self.add_to_others(hidden_states, mask, features)
        return hidden_states


class AddingAFunction(Model):
    def forward(self, hidden_states, features):
        for layer in self.layers:
            hidden_states = layer(hidden_states)
            hidden_states = self.add_a_function(hidden_states, features)
        return hidden_states


class SelectingFeatures(Model):
    def forward(self, hidden_states, count):
        for layer in self.layers:
            hidden_states = layer(hidden_states)
            hidden_states = self.select_features(hidden_states, count)
        return hidden_states


class NotPassed(Model):
    def forward(self, hidden_states):
        for layer in self.layers:
            hidden_states = layer(self.norm(hidden_states))
        return hidden_states


@pytest.mark.parametrize(("kind", "methods"), [(Plain, []), (First, []), (Adding, ["add_features"]), (Selecting, [])])
def test_understood(kind, methods):
    check_between_layers(kind(), "layers")
    assert list(methods_for_streams(kind)) == methods


@pytest.mark.parametrize(
    ("kind", "statement"),
    [
        (Inline, r"hidden_states = hidden_states \+ features"),
        (Augmented, r"hidden_states \+= features"),
        (InPlace, r"hidden_states\[:, :2\].add_\(features\)"),
        (Indexed, r"hidden_states\[:, 0\] = features"),
        (Second, r"_, hidden_states = layer\(hidden_states\)"),
        (Scaling, r"hidden_states = self.scale\(layer\(hidden_states\), 2\)"),
        (AddingToOthers, "hidden_states = self.add_to_others"),
        (AddingAFunction, "hidden_states = self.add_a_function"),
        (SelectingFeatures, "hidden_states = self.select_features"),
        (NotPassed, "for layer in self.layers:"),
        (Model, r"no loop over self\.layers that can be read"),
    ],
)
def test_refused(kind, statement):
    with pytest.raises(
        ValueError, match=rf"{kind.__name__} must hand the hidden states from layer to layer.*{statement}"
    ):
        check_between_layers(kind(), "layers")


def test_models_of_transformers():
    (llama,) = layer_loops(LlamaModel)
    assert llama == ("layers", (), None)
    (qwen,) = layer_loops(Qwen3VLTextModel)
    assert qwen == ("layers", ("_deepstack_process",), None)
    assert ("layers", (), None) in layer_loops(Gemma4TextModel)
    (granite,) = layer_loops(Granite4VisionTextModel)
    assert granite.unclear.startswith("hidden_states = hidden_states.masked_scatter(mask")


def slow_twin(text_model):
    """Adds features token by token and stream by stream."""

    def add(hidden_states, mask, features):
        hidden_states = hidden_states.clone()
        for position, (row, token) in enumerate(mask.nonzero().tolist()):
            for stream in range(hidden_states.shape[2]) if hidden_states.dim() == 4 else (None,):
                place = (row, token) if stream is None else (row, token, stream)
                hidden_states[place] = hidden_states[place] + features[position].to(hidden_states.dtype)
        return hidden_states

    text_model._deepstack_process = add


# With 4 streams and one row, as many image tokens as streams: what broadcasts wrongly does so without an error.
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("model_type", DEEPSTACK)
@torch.no_grad()
def test_image_features_go_to_every_stream(model_type, rows):
    model = make_composite(model_type)
    inputs = composite_inputs(model_type, model)
    share = {name: len(value) // 2 * rows for name, value in inputs.items()}
    inputs = {name: value[: share[name]] for name, value in inputs.items()}
    native = model(**inputs, use_cache=False).logits
    apply_hyper_connections(model, 4)
    assert (model(**inputs, use_cache=False).logits - native).abs().max() <= 1e-6 * native.abs().max()
    separate_streams(model)
    fast = model(**inputs, use_cache=False).logits
    text_model = next(part for part in model.modules() if hasattr(part, "hc_layers_path") and part.hc_layers_path)
    slow_twin(text_model)
    assert torch.equal(fast, model(**inputs, use_cache=False).logits)
    text_model._deepstack_process = lambda hidden_states, *_: hidden_states
    assert not torch.equal(fast, model(**inputs, use_cache=False).logits)


@pytest.mark.parametrize("model_type", DEEPSTACK)
@torch.no_grad()
def test_image_features_go_to_every_stream_of_an_adapter(model_type):
    base = make_composite(model_type)
    inputs = composite_inputs(model_type, base)
    native = base(**inputs, use_cache=False).logits
    model = get_peft_model(base, adapter_config(num_streams=4)).eval()
    separate_streams(model)
    adapted = model(**inputs, use_cache=False).logits
    assert not torch.equal(adapted, native)
    with model.disable_adapter():
        assert torch.equal(model(**inputs, use_cache=False).logits, native)
    full = adapter_to_model(model)
    assert torch.equal(full(**inputs, use_cache=False).logits, adapted)
