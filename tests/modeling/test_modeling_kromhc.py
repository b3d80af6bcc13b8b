"""The public faces and the Auto classes: construct, save, load, re-save, generate."""

import json
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from support.tiny import configurations, make_model, token_ids
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.distributed import DistributedConfig

from kromhc_hf import (
    KromHCConfig,
    KromHCForCausalLM,
    KromHCForSequenceClassification,
    KromHCModel,
    apply_hyper_connections,
    remove_hyper_connections,
)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FAMILIES = ["llama", "gpt2", "mixtral", "gpt_neox"]
EMPTY = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}


def trained_looking(model):
    """Hyper-connections as training might leave them: every mapping different from its initial value."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_hc." in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def equal_state(first, second) -> bool:
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(
        first[k].dtype == second[k].dtype and torch.equal(first[k], second[k]) for k in first
    )


@pytest.mark.parametrize("shards", ["single", "sharded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_save_load_and_save_again(tmp_path, family, dtype, tied, shards):
    config = configurations(family)[0]
    config.tie_word_embeddings = tied
    model = trained_looking(apply_hyper_connections(make_model(config, DTYPES[dtype]), num_streams=6))
    tokens = token_ids(config)
    size = {"max_shard_size": "40KB"} if shards == "sharded" else {}
    model.save_pretrained(tmp_path / "first", **size)
    assert (tmp_path / "first/model.safetensors.index.json").exists() == (shards == "sharded")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype="auto", output_loading_info=True)
    assert info == EMPTY
    assert type(loaded) is type(model)
    loaded.save_pretrained(tmp_path / "second", **size)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "second", dtype="auto", output_loading_info=True)
    assert info == EMPTY
    assert equal_state(model, loaded)
    assert equal_state(model, again)
    assert {p.dtype for name, p in again.named_parameters() if "_hc." in name} == {torch.float32}
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_lost_hyper_connections_are_reported(tmp_path):
    model = apply_hyper_connections(make_model(configurations("llama")[0]))
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.ffn_hc" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {f"model.layers.1.ffn_hc.{name}" for name in ("weight", "bias", "alpha")}
    assert torch.equal(loaded.model.layers[1].ffn_hc.bias, model.model.layers[1].ffn_hc.bias)


@pytest.mark.parametrize(
    ("face", "auto", "name"),
    [
        (KromHCForCausalLM, AutoModelForCausalLM, "KromHCLlamaForCausalLM"),
        (KromHCModel, AutoModel, "KromHCLlamaModel"),
        (KromHCForSequenceClassification, AutoModelForSequenceClassification, "KromHCLlamaForSequenceClassification"),
    ],
    ids=["causal", "base", "classification"],
)
def test_faces_and_auto_classes_agree(tmp_path, face, auto, name):
    config = KromHCConfig(backbone_config=configurations("llama")[0], hc_num_streams=3)
    model = face(config).eval()
    assert type(model).__name__ == name
    assert isinstance(model, face)
    model.save_pretrained(tmp_path)
    for loader in (face, auto):
        loaded, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is type(model)
        assert info == EMPTY
        assert equal_state(loaded, model)
    assert type(auto.from_config(AutoConfig.from_pretrained(tmp_path))) is type(model)


@pytest.mark.parametrize("dtype", ["auto", "float64", torch.bfloat16, torch.float32], ids=str)
def test_faces_load_in_the_dtype_that_is_asked_for(tmp_path, dtype):
    apply_hyper_connections(make_model(configurations("llama")[0], torch.float16)).save_pretrained(tmp_path)
    model = KromHCForCausalLM.from_pretrained(tmp_path, dtype=dtype, hc_num_streams=4)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert model.dtype == reference.dtype == {"auto": torch.float16, "float64": torch.float64}.get(dtype, dtype)
    assert equal_state(model, reference)


def test_classifier_loads_from_a_language_model(tmp_path):
    model = trained_looking(apply_hyper_connections(make_model(configurations("llama")[0])))
    model.save_pretrained(tmp_path)
    classifier, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"score.weight"}
    assert equal_state(classifier.model, model.model)


def test_config_is_flat_and_validated():
    backbone = LlamaConfig(hidden_size=64, num_attention_heads=4, attn_implementation="eager")
    config = KromHCConfig(backbone_config=backbone, hc_num_streams=6, hc_residual_logit=2, vocab_size=77)
    assert isinstance(config, (KromHCConfig, LlamaConfig))
    assert (config.model_type, config.hidden_size, config.vocab_size) == ("kromhc_llama", 64, 77)
    assert (config.hc_num_streams, config.hc_residual_logit, config._attn_implementation) == (6, 2.0, "eager")
    assert (backbone.vocab_size, backbone.model_type) == (32000, "llama")
    assert config.to_backbone_config().to_dict() == {**backbone.to_dict(), "vocab_size": 77}
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
    with pytest.raises(ValueError, match="KromHCConfig needs a backbone_config"):
        KromHCConfig(hc_num_streams=4)
    with pytest.raises(ValueError, match="got 7"):
        KromHCConfig(backbone_config=backbone, hc_num_streams=7)
    with pytest.raises(ValueError, match="KromHCForCausalLM needs a KromHCConfig; got LlamaConfig"):
        KromHCForCausalLM(backbone)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hc_readout": "bogus"}, "readout must be one of"),
        ({"hc_readout": "sum"}, "got readout 'sum'"),
        ({"hc_num_streams": 7}, "got 7"),
        ({"hc_eps": "x"}, "hc_eps must be of type float"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_overrides_are_checked(tmp_path, overrides, message):
    KromHCConfig(backbone_config=configurations("llama")[0]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path, **overrides)
    config = AutoConfig.from_pretrained(tmp_path)
    vars(config).update(overrides)
    with pytest.raises(ValueError, match=message):
        KromHCForCausalLM(config)


def test_mistyped_and_foreign_fields_are_refused():
    backbone = configurations("llama")[0]
    with pytest.raises(ValueError, match="hc_nstreams is not a field of KromHCLlamaConfig"):
        KromHCConfig(backbone_config=backbone, hc_nstreams=3)
    with pytest.raises(ValueError, match="num_streams must be given as hc_num_streams"):
        KromHCConfig(backbone_config=backbone, num_streams=8)
    with pytest.raises(ValueError, match="must be of model type 'llama'; got 'gpt2'"):
        type(KromHCConfig(backbone_config=backbone))(backbone_config=configurations("gpt2")[0])
    with pytest.raises(Exception, match="num_hidden_layers"):
        KromHCConfig(backbone_config=configurations("gemma2")[0], num_hidden_layers=2)


def test_a_plain_checkpoint_is_not_taken_for_a_converted_one(tmp_path):
    make_model(configurations("llama")[0]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type must start with 'kromhc_'; got 'llama'. Convert the checkpoint"):
        KromHCForCausalLM.from_pretrained(tmp_path)


def test_a_model_survives_pickling():
    model = trained_looking(apply_hyper_connections(make_model(configurations("gpt2")[0])))
    twin = pickle.loads(pickle.dumps(model))
    tokens = token_ids(model.config)
    assert torch.equal(twin(tokens).logits, model(tokens).logits)


def test_paper_init_trains_from_scratch():
    config = KromHCConfig(
        backbone_config=configurations("llama")[0], hc_init="paper", hc_readout="sum", hc_num_streams=4
    )
    torch.manual_seed(0)
    model = KromHCForCausalLM(config).train()
    mappings = model.model.layers[0].ffn_hc.mappings(torch.randn(1, 1, 4, config.hidden_size))
    favoured = torch.tensor([False, True, False, False])  # branch index 1
    assert torch.allclose(mappings.h_pre[0, 0], torch.where(favoured, 1.0, -1.0).sigmoid())
    assert torch.allclose(mappings.h_post[0, 0], 2 * torch.where(favoured, 1.0, -1.0).sigmoid())
    stay = torch.sigmoid(torch.tensor(8.0))
    assert torch.allclose(mappings.h_res[0, 0].diagonal(), stay.square())
    tokens, optimizer = token_ids(config), torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        losses.append(model(tokens, labels=tokens).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]


def said_in_training(model) -> list[str]:
    """What is said when a model goes into training, twice."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.train().eval().train()
    return [str(warning.message) for warning in caught]


def test_training_from_scratch_with_the_lossless_init_warns(tmp_path):
    backbone = configurations("llama")[0]
    config = KromHCConfig(backbone_config=backbone)
    for make in (KromHCForCausalLM, AutoModelForCausalLM.from_config):
        (message,) = said_in_training(make(config))
        assert "hc_init='identity' is for pretrained weights" in message
        assert "Use hc_init='paper'" in message
    for options in ({"hc_init": "paper"}, {"hc_num_streams": 1}):
        assert not said_in_training(KromHCForCausalLM(KromHCConfig(backbone_config=backbone, **options)))
    # Weights that come from somewhere, in whichever way.
    assert not said_in_training(apply_hyper_connections(make_model(backbone, torch.float32)))
    model = KromHCForCausalLM(config)
    model.save_pretrained(tmp_path)
    assert not said_in_training(KromHCForCausalLM.from_pretrained(tmp_path))
    for part in ("", "model"):
        loaded = KromHCForCausalLM(config)
        loaded.get_submodule(part).load_state_dict(model.get_submodule(part).state_dict())
        assert not said_in_training(loaded)
    with torch.device("meta"):
        assert not said_in_training(KromHCForCausalLM(config))
    assert not said_in_training(remove_hyper_connections(KromHCForCausalLM(config)))


def test_static_mappings_have_no_weight(tmp_path):
    model = apply_hyper_connections(make_model(configurations("llama")[0]), dynamic=False)
    names = {name.rpartition(".")[2] for name in model.state_dict() if "_hc." in name}
    assert names == {"bias"}
    model.save_pretrained(tmp_path)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info == EMPTY


def test_text_generation_pipeline(shared):
    from transformers import AutoTokenizer, pipeline

    folder = shared / "models/stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    options = {"max_new_tokens": 12, "do_sample": False}
    before = pipeline("text-generation", model=model, tokenizer=tokenizer)("Once upon a time", **options)
    apply_hyper_connections(model)
    after = pipeline("text-generation", model=model, tokenizer=tokenizer)("Once upon a time", **options)
    assert after == before


def test_pipeline_parallelism_is_refused():
    model = apply_hyper_connections(make_model(configurations("llama")[0]))
    with pytest.raises(ValueError, match=r"pp_size must be 1 .*; got 2\. Use tp_size or fsdp_size"):
        type(model).maybe_distribute_model(model, DistributedConfig(pp_size=2))


def test_import_loads_no_model_family():
    script = (
        "import sys, json, kromhc_hf;"
        "print(json.dumps([m for m in sys.modules if m.startswith('transformers.models.') and '.modeling_' in m]))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = json.loads(result.stdout.splitlines()[-1])
    # What transformers itself loads with the Auto classes does not count.
    script = script.replace("kromhc_hf", "transformers.models.auto.modeling_auto")
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert set(loaded) <= set(json.loads(result.stdout.splitlines()[-1]))


def test_live_and_loaded_agree_with_native_loss():
    config = configurations("llama")[0]
    native = make_model(config)
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(native.state_dict())
    apply_hyper_connections(model)
    tokens = token_ids(config)
    assert torch.equal(model(tokens, labels=tokens).loss, native(tokens, labels=tokens).loss)
