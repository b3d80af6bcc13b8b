"""A face takes what `from_pretrained` of its Auto class takes, and so do the classes that it stands for."""

import json

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from support.hub_server import TOKEN
from support.tiny import configurations, make_model
from transformers import AutoConfig, AutoModelForCausalLM

from kromhc_hf import (
    KromHCConfig,
    KromHCForCausalLM,
    KromHCForQuestionAnswering,
    KromHCForSequenceClassification,
    KromHCForTokenClassification,
    KromHCModel,
    apply_hyper_connections,
)


FACES = (
    KromHCForCausalLM,
    KromHCModel,
    KromHCForSequenceClassification,
    KromHCForTokenClassification,
    KromHCForQuestionAnswering,
)
FIRST, SECOND = "a" * 40, "b" * 40


def connected(family: str = "llama", seed: int = 0):
    return apply_hyper_connections(make_model(configurations(family)[0], seed=seed), num_streams=2)


def made(face, seed: int):
    torch.manual_seed(seed)
    return face(KromHCConfig(backbone_config=configurations("llama")[0], hc_num_streams=2))


def embedding(model) -> torch.Tensor:
    return model.get_input_embeddings().weight


@pytest.fixture(params=FACES, ids=lambda face: face.__name__)
def loaders(request):
    """A face, and the class of its family, which is made when the face meets its configuration."""
    return request.param, type(made(request.param, 0))


@pytest.fixture
def cache(tmp_path, loaders):
    """A cache with two commits of one repository: main, and a branch with other weights."""
    repository = tmp_path / "hub/models--ada--connected"
    made(loaders[0], 1).save_pretrained(repository / "snapshots" / FIRST)
    made(loaders[0], 2).save_pretrained(repository / "snapshots" / SECOND)
    (repository / "refs").mkdir()
    for name, commit in (("main", FIRST), ("v2", SECOND)):
        (repository / "refs" / name).write_text(commit)
    return tmp_path / "hub"


def test_a_revision_is_that_of_the_weights_too(cache, monkeypatch, loaders):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    wanted = {None: 1, "v2": 2, SECOND: 2}
    for revision, seed in wanted.items():
        for loader in loaders:
            model = loader.from_pretrained("ada/connected", revision=revision, code_revision="v1", dtype="auto")
            assert isinstance(model, loader)
            assert torch.equal(embedding(model), embedding(made(loader, seed)))


def test_another_cache(cache, loaders):
    for loader in loaders:
        keywords = {"cache_dir": cache, "local_files_only": True, "trust_remote_code": True}
        model = loader.from_pretrained("ada/connected", revision="v2", **keywords)
        assert torch.equal(embedding(model), embedding(made(loader, 2)))
        with pytest.raises(OSError, match="in the cached files"):
            loader.from_pretrained("ada/connected", local_files_only=True)


def test_a_subfolder(tmp_path, loaders):
    made(loaders[0], 1).save_pretrained(tmp_path)
    made(loaders[0], 2).save_pretrained(tmp_path / "deep/er", variant="fp16")
    for loader in loaders:
        model, info = loader.from_pretrained(tmp_path, subfolder="deep/er", variant="fp16", output_loading_info=True)
        assert torch.equal(embedding(model), embedding(made(loader, 2)))
        assert info["mismatched_keys"] == set()


def test_a_configuration_by_path_or_object(tmp_path, loaders):
    made(loaders[0], 1).save_pretrained(tmp_path / "weights")
    other = KromHCConfig.from_pretrained(tmp_path / "weights")
    other.rms_norm_eps = 0.25
    other.save_pretrained(tmp_path / "config")
    for loader in loaders:
        for config in (tmp_path / "config", str(tmp_path / "config/config.json"), other):
            model = loader.from_pretrained(tmp_path / "weights", config=config, dtype=torch.bfloat16)
            assert model.config.rms_norm_eps == 0.25
            assert model.dtype == torch.bfloat16
        # Without a configuration, keywords change the one that is loaded.
        assert loader.from_pretrained(tmp_path / "weights", rms_norm_eps=0.5).config.rms_norm_eps == 0.5


def test_a_token_and_a_new_download(hub, tmp_path, monkeypatch):
    connected("gpt2", seed=1).push_to_hub("ada/connected")
    hub.repositories["ada/connected"].private = True
    monkeypatch.delenv("HF_TOKEN")
    for loader in (KromHCForCausalLM, KromHCConfig):
        with pytest.raises(OSError, match="ada/connected"):
            loader.from_pretrained("ada/connected", token=False)
    assert KromHCConfig.from_pretrained("ada/connected", token=TOKEN).hc_num_streams == 2
    before = len(hub.ranges)
    for keywords, downloads in (({}, 1), ({}, 0), ({"force_download": True}, 1)):
        model = KromHCForCausalLM.from_pretrained("ada/connected", token=TOKEN, **keywords)
        assert torch.equal(embedding(model), embedding(connected("gpt2", seed=1)))
        assert len(hub.ranges) - before == downloads
        before = len(hub.ranges)


def test_a_configuration_takes_the_keywords_of_auto_config(cache, tmp_path):
    keywords = {"cache_dir": cache, "revision": "v2", "trust_remote_code": True, "code_revision": "v1"}
    for loader in (KromHCConfig, AutoConfig):
        config, rest = loader.from_pretrained("ada/connected", **keywords, other=3, return_unused_kwargs=True)
        assert config.hc_num_streams == 2
        assert rest == {"other": 3}


@pytest.mark.parametrize("connect", [True, False], ids=["connected", "plain"])
def test_an_adapter_whose_base_has_hyper_connections_or_not(tmp_path, connect):
    model = connected() if connect else make_model(configurations("llama")[0])
    model.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    if not connect:
        with pytest.raises(ValueError, match="KromHCForCausalLM needs a KromHCConfig; got LlamaConfig"):
            KromHCForCausalLM.from_pretrained(tmp_path / "adapter")
        return
    loaded = KromHCForCausalLM.from_pretrained(tmp_path / "adapter")
    assert isinstance(loaded, KromHCForCausalLM)
    assert any("lora_A" in name for name, _ in loaded.named_parameters())


@pytest.mark.parametrize("key", ["hc_mult", "hc_sinkhorn_iters"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_a_base_calls_hc_is_kept(tmp_path, family, key):
    """The prefix is not ours alone."""
    config = configurations(family)[0]
    setattr(config, key, 4)
    model = apply_hyper_connections(make_model(config))
    model.save_pretrained(tmp_path / "live")
    content = json.loads((tmp_path / "live/config.json").read_text())
    assert content[key] == 4
    for loader in (AutoConfig, KromHCConfig):
        loaded = loader.from_pretrained(tmp_path / "live", **{key: 5})
        assert getattr(loaded, key) == 5
        again = type(loaded).from_dict(loaded.to_dict())
        assert getattr(again, key) == 5
        assert getattr(again.to_backbone_config(), key) == 5
    assert getattr(KromHCForCausalLM.from_pretrained(tmp_path / "live").config, key) == 4
    assert getattr(KromHCConfig(backbone_config=config, **{key: 6}), key) == 6
    # One letter more is nobody's.
    for load in (AutoConfig.from_pretrained, KromHCConfig.from_pretrained, KromHCForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=f"{key}s is not a field of"):
            load(tmp_path / "live", **{f"{key}s": 5})


@pytest.mark.parametrize("name", ["hc_eps", "hc_num_streams", "hc_conversion"])
def test_a_base_with_a_field_of_our_name_is_refused(name):
    config = configurations("llama")[0]
    setattr(config, name, 2)
    model = make_model(config)
    before = type(model)
    with pytest.raises(ValueError, match=f"must have no field {name}, .*got {name}=2 in a LlamaConfig"):
        apply_hyper_connections(model)
    assert type(model) is before
    assert model.config.model_type == "llama"
