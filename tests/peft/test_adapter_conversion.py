"""From an adapter to a full model and back, from Python and from the command line."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.adapters import (
    FAMILIES,
    adapter_config,
    base_model,
    lora_config,
    perturb,
    perturb_hyper_connections,
)
from support.connected import LEARNED_READOUTS
from support.hub_client import push_base
from support.runs import retrofitted
from support.tiny import token_ids
from transformers import AutoModelForCausalLM

import kromhc_hf.peft.conversion
from kromhc_hf import (
    HyperConnection,
    KromHCForCausalLM,
    adapter_to_model,
    apply_hyper_connections,
    convert_checkpoint,
    hyper_connection_state_dict,
    model_to_adapter,
)
from kromhc_hf.modeling.options import OPTIONS
from kromhc_hf.modeling.stream_ends import READOUTS
from kromhc_hf.modeling.variants import VARIANTS
from kromhc_hf.peft.conversion import adapter_to_checkpoint, checkpoint_to_adapter


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("num_streams", [1, 2])
def test_the_adapter_computes_what_the_full_model_does(model_type, num_streams):
    model = get_peft_model(base_model(model_type), adapter_config(num_streams=num_streams, residual_logit=2.0))
    perturb(model)
    ids = token_ids(model.config)
    logits = model(ids).logits
    full = adapter_to_model(model)
    assert isinstance(full, KromHCForCausalLM)
    assert (full.config.hc_num_streams, full.config.hc_residual_logit) == (num_streams, 2.0)
    assert torch.equal(full(ids).logits, logits)


def test_full_model_to_adapter_and_back(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    full = retrofitted(num_streams=2)
    perturb_hyper_connections(full)
    ids = token_ids(full.config)
    logits = full(ids).logits
    config = model_to_adapter(full, tmp_path / "adapter", tmp_path / "base")
    assert config.num_streams == 2
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (written["peft_type"], written["base_model_type"]) == ("KROMHC", "llama")
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(model(ids).logits, logits)
    again = adapter_to_model(model)
    assert torch.equal(again(ids).logits, logits)
    for name, tensor in hyper_connection_state_dict(full).items():
        assert torch.equal(hyper_connection_state_dict(again)[name], tensor)
    with pytest.raises(ValueError, match="must have hyper-connections to write as an adapter"):
        model_to_adapter(base_model(), tmp_path / "none", "base")


def test_the_base_of_a_full_model_is_found_where_it_says_that_it_comes_from(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    full = apply_hyper_connections(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    perturb_hyper_connections(full)
    config = model_to_adapter(full, tmp_path / "adapter")
    assert config.base_model_name_or_path == str(tmp_path / "base")
    ids = token_ids(full.config)
    assert torch.equal(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")(ids).logits, full(ids).logits)
    with pytest.raises(ValueError, match="got none, and the model does not say what it comes from. Give it"):
        model_to_adapter(retrofitted(), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_an_adapter_that_could_not_be_written_leaves_no_configuration(tmp_path, monkeypatch):
    base_model().save_pretrained(tmp_path / "base")

    def out_of_memory(model):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(kromhc_hf.peft.conversion, "hyper_connection_state_dict", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        model_to_adapter(retrofitted(), tmp_path / "adapter", tmp_path / "base")
    assert not (tmp_path / "adapter").exists()


# Every option away from its default, with the values that it may have where those are names.
AWAY = [
    {"num_streams": 3, "variant": "identity", "init": "paper", "readout": "sum"},
    {"num_streams": 3, "init": "paper", "readout": "norm_sum", "residual_logit": 2.0},
    {"variant": "mhc", "sinkhorn_iterations": 2, "eps": 1e-2},
    {"variant": "go_mhc", "num_streams": 3},
    {"variant": "orthogonal", "num_streams": 2},
    {"generator": "cp", "generator_rank": 3},
    {"num_streams": 2, "read": "gated", "read_rank": 4},
    {"variant": "tbp", "stream_embedding": True, "residual_logit": 1.0, "layers": (1, 2), "stream_recompute": 2},
    {"variant": "mhc_lite", "num_streams": 2, "dynamic": False, "readout": "softmax"},
    *(
        {"variant": variant, "readout": readout, "eps": 1e-3, "stream_embedding": True}
        for variant, readout in zip(("hc", "one_sided", "circulant"), LEARNED_READOUTS, strict=True)
    ),
]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("options", AWAY, ids=lambda options: "-".join(map(str, options.values())))
def test_every_option_reaches_the_adapter_and_comes_back(tmp_path, options, model_type):
    base_model(model_type).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    full = apply_hyper_connections(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), **options)
    perturb_hyper_connections(full)
    ids = token_ids(full.config)
    expected = full(ids, output_hidden_states=True, use_cache=False)
    model_to_adapter(full, tmp_path / "adapter", tmp_path / "base")
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    found = model(ids, output_hidden_states=True, use_cache=False)
    assert torch.equal(found.logits, expected.logits)
    for ours, wanted in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(ours, wanted)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, base_model(model_type)(ids).logits)
    model.save_pretrained(tmp_path / "again")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again(ids).logits, expected.logits)
    assert torch.equal(adapter_to_model(again)(ids).logits, expected.logits)


def test_options_away_from_their_defaults_cover_all_of_them():
    assert {name for options in AWAY for name in options} == set(OPTIONS)
    assert {options.get("readout", "mean") for options in AWAY} == set(READOUTS)
    assert {options.get("variant", "kromhc") for options in AWAY} == set(VARIANTS)


def test_command_line_from_adapter_to_model_and_back(tmp_path, kromhc):
    base_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, adapter_config())
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "_hc." in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    tokens = torch.arange(3, 13).unsqueeze(0)
    with torch.no_grad():
        expected = adapted.eval()(tokens).logits
    code, _, err = kromhc("convert", tmp_path / "adapter", tmp_path / "full", "--variant", "mhc")
    assert code == 2
    assert f"Its full model is what kromhc adapter {tmp_path / 'adapter'} DESTINATION writes." in " ".join(err.split())
    get_peft_model(base_model(), lora_config()).save_pretrained(tmp_path / "lora")
    code, _, err = kromhc("convert", tmp_path / "lora", tmp_path / "full")
    assert (code, "Merge the adapter first: merge_and_unload()" in " ".join(err.split())) == (2, True)
    code, out, _ = kromhc("adapter", tmp_path / "adapter", tmp_path / "full")
    assert (code, str(tmp_path / "full") in out) == (0, True)
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    with torch.no_grad():
        assert torch.equal(full(tokens).logits, expected)
    code, _, _ = kromhc("adapter", tmp_path / "full", tmp_path / "back", "--base", tmp_path / "base")
    assert code == 0
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "back")
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, expected)
        full.lm_head.weight[0, 0] += 1
    full.save_pretrained(tmp_path / "trained")
    code, _, err = kromhc("adapter", tmp_path / "trained", tmp_path / "no", "--base", tmp_path / "base")
    assert code == 2
    assert "must have the same weights as the model" in " ".join(err.split())
    assert not (tmp_path / "no").exists()


def spoiled(folder: Path, what: str) -> None:
    """Takes something out of an adapter, or puts it elsewhere."""
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    content, tensors = json.loads(config.read_text()), load_file(weights)
    if what == "method":
        content["peft_type"] = "LORA"
    elif what == "base":
        content["base_model_name_or_path"] = None
    elif what == "missing tensor":
        del tensors["base_model.model.model.layers.1.ffn_hc.hyper_connection_adapters.bias"]
    elif what == "other shape":
        content["num_streams"] = 3
    config.write_text(json.dumps(content))
    save_file(tensors, weights, metadata={"format": "pt"})
    if what == "cut off":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "no tensors":
        weights.unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("method", "with peft_type 'KROMHC'; got 'LORA'"),
        ("base", "must name its base in base_model_name_or_path; got None. Give it with --base."),
        ("missing tensor", r"'model.layers.1.ffn_hc.bias' with shape [10], to fit KromHCLlamaForCausalLM; got None"),
        ("other shape", "'model.layers.0.attn_hc.bias' with shape"),
        ("cut off", "adapter_model.safetensors must be a complete file of tensors"),
        ("no tensors", "must hold adapter_model.safetensors; it does not"),
    ],
)
def test_command_line_refuses_adapters_that_are_not_whole(tmp_path, kromhc, what, message):
    base_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, adapter_config()).save_pretrained(tmp_path / "adapter")
    spoiled(tmp_path / "adapter", what)
    code, out, err = kromhc("adapter", tmp_path / "adapter", tmp_path / "full")
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
    assert not (tmp_path / "full").exists()
    if what == "base":
        assert kromhc("adapter", tmp_path / "adapter", tmp_path / "full", "--base", tmp_path / "base")[0] == 0


def test_command_line_asks_for_the_base_of_a_model_that_does_not_tell(tmp_path, kromhc):
    retrofitted().save_pretrained(tmp_path / "full")
    code, _, err = kromhc("adapter", tmp_path / "full", tmp_path / "adapter")
    assert code == 2
    assert "does not say its own. Give it with --base." in " ".join(err.split())
    code, _, err = kromhc("adapter", tmp_path / "nothing", tmp_path / "adapter")
    assert code == 2
    assert "must be an existing folder" in " ".join(err.split())


def test_command_line_refuses_a_base_with_hyper_connections(tmp_path, kromhc):
    retrofitted().save_pretrained(tmp_path / "full")
    code, _, err = kromhc("adapter", tmp_path / "full", tmp_path / "adapter", "--base", tmp_path / "full")
    assert (code, "has been converted already" in " ".join(err.split())) == (2, True)
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_becomes_a_model_on_the_revision_that_it_was_made_for(hub, tmp_path, kromhc):
    base_model(seed=1).save_pretrained(tmp_path / "base")
    first = push_base(tmp_path / "base")
    base_model(seed=2).save_pretrained(tmp_path / "later")
    HfApi().upload_folder(repo_id="ada/base", folder_path=tmp_path / "later")
    base = AutoModelForCausalLM.from_pretrained("ada/base", revision=first)
    adapted = get_peft_model(base, adapter_config(revision=first))
    perturb(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    ids = token_ids(base.config)
    assert kromhc("adapter", tmp_path / "adapter", tmp_path / "full")[0] == 0
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert torch.equal(full(ids).logits, adapted.eval()(ids).logits)
    # The model knows its base, so that the way back needs no option.
    assert full.config.hc_conversion["base_revision"] == first
    assert kromhc("adapter", tmp_path / "full", tmp_path / "back")[0] == 0
    written = json.loads((tmp_path / "back/adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == ("ada/base", first)
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "back")
    assert torch.equal(again(ids).logits, full(ids).logits)


def test_code_of_the_base_does_not_come_along(tmp_path, kromhc):
    base_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, adapter_config()).save_pretrained(tmp_path / "adapter")
    settings = tmp_path / "base/tokenizer_config.json"
    settings.write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil/repo--t.T", None]}}))
    code, _, err = kromhc("adapter", tmp_path / "adapter", tmp_path / "full")
    assert (code, "must not name code outside its own folder" in " ".join(err.split())) == (2, True)
    assert not (tmp_path / "full").exists()


def test_the_kernel_comes_along():
    model = get_peft_model(base_model(), adapter_config())
    for module in model.modules():
        if isinstance(module, HyperConnection):
            module.kernel = "auto"
    full = adapter_to_model(model)
    assert {module.kernel for module in full.modules() if isinstance(module, HyperConnection)} == {"auto"}


def test_a_tokenizer_that_needs_code_is_in_the_way_where_it_would_be_copied_alone(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    convert_checkpoint(tmp_path / "base", tmp_path / "full")
    (tmp_path / "base/tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["own.Tokenizer", null]}}')
    checkpoint_to_adapter(tmp_path / "full", tmp_path / "adapter", tmp_path / "base")
    with pytest.raises(ValueError, match="a tokenizer that needs no code of its own"):
        adapter_to_checkpoint(tmp_path / "adapter", tmp_path / "again", tmp_path / "base")
    assert not (tmp_path / "again").exists()
