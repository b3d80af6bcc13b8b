"""What a release of transformers does is detected, and what is not understood is refused."""

import functools
import subprocess
import sys
import types
import warnings

import pytest
import torch
import transformers
from support.tiny import configurations, make_model, separate_streams, token_ids
from torch import nn

from kromhc_hf import KromHCConfig, apply_hyper_connections, has_hyper_connections, supported_model_types
from kromhc_hf.modeling import configuration_kromhc, host, modeling_kromhc, releases
from kromhc_hf.modeling.families import SUPPORTED
from kromhc_hf.modeling.host import CACHE_NAMES, forward_parameters


def silent(forward):
    """A decorator that does not say what it wraps, as transformers 5.13 has it on recurrent modules."""

    def wrapped(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    return wrapped


def test_a_decorator_is_seen_through():
    class Module:
        @silent
        def forward(self, hidden_states, cache_params=None, attention_mask=None):
            return hidden_states

    assert forward_parameters(Module) == (("hidden_states", "cache_params", "attention_mask"), False)


def generate(model):
    return model.generate(token_ids(model.config), max_new_tokens=5, min_new_tokens=5, do_sample=False)


def with_forward(model, path, change):
    """The model with another forward in the class of one of its modules, which no other model has."""
    module = model.get_submodule(path)
    module.__class__ = type(type(module).__name__, (type(module),), {"__module__": type(module).__module__})
    type(module).forward = change(type(module).forward)
    return model


def test_a_recurrent_module_behind_such_a_decorator_gets_its_cache():
    native = generate(make_model(configurations("mamba")[0]))
    model = with_forward(make_model(configurations("mamba")[0]), "backbone.layers.1.mixer", silent)
    apply_hyper_connections(model)
    assert torch.equal(generate(model), native)


def with_unknown_cache(_):
    def forward(self, hidden_states, state=None, **kwargs):
        return hidden_states

    return forward


@pytest.mark.parametrize(
    ("model_type", "path"),
    [
        ("mamba", "backbone.layers.1.mixer"),
        ("nemotron_h", "model.layers.0.mixer"),
        ("llama", "model.layers.1.self_attn"),
    ],
)
def test_a_layer_whose_cache_reaches_no_module_is_refused(model_type, path):
    model = with_forward(make_model(configurations(model_type)[0]), path, with_unknown_cache)
    with pytest.raises(
        ValueError, match=r"layer \d .*must have a module '\w+' that takes its cache, as cache, past_key"
    ):
        apply_hyper_connections(model)
    assert not has_hyper_connections(model)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_layer_takes_its_cache_by_any_name(name):
    """Models of one release may be called by code that was written for another."""
    model = apply_hyper_connections(make_model(configurations("llama")[0]))
    separate_streams(model)
    ids, layer = token_ids(model.config), model.model.layers[0]
    cache = transformers.DynamicCache(config=model.config)
    embedded = model.model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    layer(embedded, position_embeddings=model.model.rotary_emb(embedded, positions), **{name: cache})
    assert cache.get_seq_length(0) == ids.shape[1]


def test_families_that_the_release_lacks(monkeypatch):
    monkeypatch.delitem(host.CONFIG_MAPPING_NAMES, "lfm2")
    monkeypatch.setattr(configuration_kromhc, "_CLASSES", {})
    assert set(SUPPORTED) - set(supported_model_types()) >= {"lfm2"}
    config = types.SimpleNamespace(model_type="lfm2")
    with pytest.raises(ValueError, match=r"'lfm2' needs a transformers that has it; got \d.*transformers_version"):
        KromHCConfig(backbone_config=config)
    for module in (configuration_kromhc, modeling_kromhc):
        # The names of all other families are found.
        assert module.KromHCLlamaConfig.model_type == "kromhc_llama"
        with pytest.raises(AttributeError, match=r"'KromHCLfm2Config': transformers \d.* does not have its family"):
            _ = module.KromHCLfm2Config
        with pytest.raises(AttributeError, match=r"no attribute 'other'$"):
            _ = module.other


def test_a_configuration_is_no_custom_code():
    """Transformers 5.16 rewrites the kinds of layers in that of custom code by names that lfm2 does not know."""
    config = KromHCConfig(backbone_config=configurations("lfm2")[0])
    assert not config.is_custom_code()
    config.validate()
    assert config.layer_types == ["conv", "full_attention", "conv"]


def imported_with(version: str) -> str:
    """What importing the package prints where transformers says that it is of another version."""
    code = f"import transformers; transformers.__version__ = {version!r}; import kromhc_hf"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr


def test_an_older_release_is_refused_in_words():
    assert 'pip install "transformers>=5.6"' in imported_with("5.5.4").splitlines()[-1]


def test_a_newer_release_gets_one_warning():
    assert imported_with("5.99.0.dev0").count("UserWarning: kromhc-hf is tested with transformers 5.6 to ") == 1


def test_the_installed_release_gets_none():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        releases.warn_if_untested()


@pytest.mark.parametrize("resolved", ["a" * 40, None])
def test_the_commit_of_a_repository(monkeypatch, resolved):
    answer = types.SimpleNamespace(resolved=resolved) if resolved else "main"
    monkeypatch.setattr(host.hub, "resolve_revision", lambda repository, revision: answer, raising=False)
    assert host.commit_of("org/name", "main") == resolved


def test_the_commit_of_a_repository_where_no_function_tells(monkeypatch, tmp_path):
    """Up to 5.17."""
    monkeypatch.delattr(host.hub, "resolve_revision", raising=False)
    path = tmp_path / "models--org--name" / "snapshots" / ("b" * 40) / "config.json"
    monkeypatch.setattr(host.hub, "cached_file", lambda repository, name, revision: str(path))
    assert host.commit_of("org/name") == "b" * 40

    def absent(*_, **__):
        raise OSError

    monkeypatch.setattr(host.hub, "cached_file", absent)
    assert host.commit_of("org/name") is None


def test_tensors_are_loaded_with_the_plan_that_earlier_releases_want(monkeypatch):
    calls = []

    def earlier(model, state_dict, load_config, tp_plan, disk_offload_index=None):
        calls.append((state_dict, tp_plan))
        return "report", None

    monkeypatch.setattr(host, "convert_and_load_state_dict_in_model", earlier)
    assert host.load_tensors(nn.Linear(1, 1), {"weight": 1}, None) == "report"
    assert calls == [({"weight": 1}, None)]


def test_the_wrapped_forward_of_functools_is_seen_through():
    class Module:
        def forward(self, hidden_states):
            return hidden_states

    class Wrapped:
        forward = functools.wraps(Module.forward)(lambda *args, **kwargs: None)

    assert forward_parameters(Wrapped) == (("hidden_states",), False)
