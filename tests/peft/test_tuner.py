"""PEFT both ways: adapters on a model with hyper-connections, and hyper-connections as an adapter on a plain base."""

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.connected import LEARNED_READOUTS
from support.runs import losses, make_trainer, retrofitted
from support.tiny import configurations, make_model, token_ids
from transformers import AutoModelForCausalLM

from kromhc_hf import (
    KromHCForCausalLM,
    KromHCPeftConfig,
    adapter_to_model,
    apply_hyper_connections,
    has_hyper_connections,
    hyper_connection_state_dict,
    model_to_adapter,
    record_mappings,
    supported_model_types,
)
from kromhc_hf.modeling.options import OPTIONS
from kromhc_hf.modeling.stream_ends import READOUTS
from kromhc_hf.modeling.variants import VARIANTS


FAMILIES = ["llama", "gpt2", "gpt_neox", "mixtral", "gemma2"]


def base_model(model_type: str = "llama", seed: int = 0, **changes):
    config = configurations(model_type)[0]
    for name, value in changes.items():
        setattr(config, name, value)
    return make_model(config, seed=seed)


def adapter_config(**options) -> KromHCPeftConfig:
    return KromHCPeftConfig(task_type="CAUSAL_LM", **options)


def perturb(model) -> None:
    """Trained parameters stand somewhere else than where they started."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


# -- adapters on a model with hyper-connections


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
def test_all_linear_lora_leaves_hyper_connections_alone(model_type):
    native = get_peft_model(base_model(model_type), LoraConfig(target_modules="all-linear"))
    model = get_peft_model(retrofitted(model_type), LoraConfig(target_modules="all-linear"))
    assert model.targeted_module_names == native.targeted_module_names
    assert not any(".attn_hc." in n or ".block_hc." in n for n, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_modules_to_save_trains_and_saves_hyper_connections(tmp_path, model_type):
    base_folder, adapter_folder = tmp_path / "base", tmp_path / "adapter"
    retrofitted(model_type).save_pretrained(base_folder)
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        modules_to_save=["attn_hc", "ffn_hc"],
        init_lora_weights=False,
    )
    model = get_peft_model(base, config)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len([name for name in trainable if "_hc.modules_to_save" in name]) == 3 * 2 * 3
    assert all("lora_" in name or "_hc.modules_to_save" in name for name in trainable)
    trainer = make_trainer(tmp_path, model, max_steps=2)
    trainer.train()
    model.eval()
    ids = token_ids(base.config)
    logits = model(ids).logits
    with record_mappings(model) as records:
        model(ids)
    assert len(records) == 6
    model.save_pretrained(adapter_folder)
    with safe_open(adapter_folder / "adapter_model.safetensors", "pt") as file:
        own = [file.get_tensor(key) for key in file.keys() if "_hc." in key]  # noqa: SIM118
    assert len(own) == 3 * 2 * 3
    assert {tensor.dtype for tensor in own} == {torch.float32}
    loaded = AutoPeftModelForCausalLM.from_pretrained(adapter_folder)
    assert isinstance(loaded.get_base_model(), KromHCForCausalLM)
    assert torch.equal(loaded(ids).logits, logits)
    with pytest.raises(ValueError, match=r"modules_to_save=\['attn_hc', 'ffn_hc'\].* has none"):
        PeftModel.from_pretrained(base_model(model_type), adapter_folder)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*attn_hc"):
        PeftModel.from_pretrained(retrofitted(model_type, num_streams=2), adapter_folder)


def test_modules_to_save_of_a_parallel_block_is_its_one_hyper_connection():
    with pytest.raises(ValueError, match="GPTNeoXForCausalLM has block_hc instead"):
        get_peft_model(retrofitted("gpt_neox"), LoraConfig(modules_to_save=["attn_hc", "ffn_hc"]))
    model = get_peft_model(retrofitted("gpt_neox"), LoraConfig(modules_to_save=["block_hc"]))
    assert sum("block_hc.modules_to_save" in n for n, p in model.named_parameters() if p.requires_grad) == 3 * 3


@pytest.mark.parametrize("method", ["LORA", "IA3", "LN_TUNING", "VERA"])
def test_default_targets_are_those_of_the_family(method):
    config_class = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[method]]
    native = get_peft_model(base_model(), config_class(task_type="CAUSAL_LM"))
    model = get_peft_model(retrofitted(), config_class(task_type="CAUSAL_LM"))
    assert model.targeted_module_names == native.targeted_module_names


def test_every_default_of_peft_is_mirrored():
    constants = vars(peft.utils.constants)
    by_type = {
        name: c for name, c in constants.items() if name.startswith("TRANSFORMERS_MODELS_TO_") and type(c) is dict
    }
    assert len(by_type) > 10
    for mapping in by_type.values():
        for model_type in supported_model_types():
            assert mapping.get(f"kromhc_{model_type}") == mapping.get(model_type)


# -- hyper-connections as an adapter


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_new_adapter_keeps_the_function_and_disabling_gives_the_base(model_type):
    base = base_model(model_type)
    native_class = type(base)
    ids = token_ids(base.config)
    options = {"output_hidden_states": True, "use_cache": False}
    expected = base(ids, **options)
    model = get_peft_model(base, adapter_config())
    new = model(ids, **options)
    assert torch.equal(new.logits, expected.logits)
    for ours, native in zip(new.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(ours, native)
    perturb(model)
    trained = model(ids, **options)
    assert not torch.equal(trained.logits, expected.logits)
    assert [h.shape for h in trained.hidden_states] == [h.shape for h in expected.hidden_states]
    assert torch.equal(model(ids, output_hidden_states=True, return_dict=False)[0], trained.logits)
    with model.disable_adapter():
        base_again = model(ids, **options)
        assert torch.equal(base_again.logits, expected.logits)
        assert all(map(torch.equal, base_again.hidden_states, expected.hidden_states))
    assert torch.equal(model(ids).logits, trained.logits)
    unloaded = model.unload()
    assert type(unloaded) is native_class
    assert not has_hyper_connections(unloaded)
    assert torch.equal(unloaded(ids).logits, expected.logits)
    assert set(unloaded.state_dict()) == set(base_model(model_type).state_dict())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_adapter_computes_what_the_full_model_does(model_type):
    model = get_peft_model(base_model(model_type), adapter_config(num_streams=2, residual_logit=2.0))
    perturb(model)
    ids = token_ids(model.config)
    logits = model(ids).logits
    full = adapter_to_model(model)
    assert isinstance(full, KromHCForCausalLM)
    assert (full.config.hc_num_streams, full.config.hc_residual_logit) == (2, 2.0)
    assert torch.equal(full(ids).logits, logits)


def test_adapter_trains_alone_and_in_float32():
    base = base_model().to(torch.bfloat16).train()
    model = get_peft_model(base, adapter_config())
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 3 * 2 * 3
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    ids = token_ids(base.config)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in trainable.values())
    assert all(p.grad is None for p in base.parameters() if not p.requires_grad)


def test_only_hyper_connections_are_saved_and_auto_class_loads_them(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, adapter_config())
    perturb(model)
    ids = token_ids(base.config)
    logits = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 3 * 2 * 3
    assert all("_hc." in key for key in tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded(ids).logits, logits)
    assert not any(p.requires_grad for p in loaded.parameters())
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", low_cpu_mem_usage=True, is_trainable=True)
    assert torch.equal(again(ids).logits, logits)
    assert sum(p.requires_grad for p in again.parameters()) == 3 * 2 * 3
    ids_out = loaded.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(ids_out, model.generate(input_ids=ids, max_new_tokens=4, do_sample=False))


def test_a_fresh_process_loads_all_three_kinds_of_files(tmp_path):
    """LoRA with modules_to_save, hyper-connections as an adapter, and these stacked on LoRA."""
    base_model().save_pretrained(tmp_path / "base")
    retrofitted().save_pretrained(tmp_path / "full")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    with_lora = get_peft_model(full, LoraConfig(task_type="CAUSAL_LM", modules_to_save=["attn_hc", "ffn_hc"]))
    adapter = get_peft_model(base, adapter_config())
    low_rank_base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(low_rank_base, lora_config(), adapter_name="low_rank")
    stacked = get_peft_model(low_rank_base, adapter_config(), adapter_name="streams")
    models = {"with_lora": with_lora, "adapter": adapter, "stacked": stacked}
    ids = token_ids(base.config)
    expected = {"ids": ids}
    for name, model in models.items():
        perturb(model)
        model.save_pretrained(tmp_path / name)
        expected[name] = model.eval()(ids).logits
    torch.save(expected, tmp_path / "expected.pt")
    result = run_python(
        """
import sys, torch
import kromhc_hf
assert "peft" not in sys.modules
import peft
folder = sys.argv[1]
expected = torch.load(folder + "/expected.pt")
models = {name: peft.AutoPeftModelForCausalLM.from_pretrained(f"{folder}/{name}") for name in ("with_lora", "adapter")}
low_rank = peft.AutoPeftModelForCausalLM.from_pretrained(folder + "/stacked/low_rank", adapter_name="low_rank")
models["stacked"] = peft.PeftModel.from_pretrained(
    low_rank.get_base_model(), folder + "/stacked/streams", adapter_name="streams"
)
for name, model in models.items():
    assert torch.equal(model.eval()(expected["ids"]).logits, expected[name]), name
print("loaded", *models)
""",
        tmp_path,
    )
    assert result.stdout.splitlines()[-1:] == ["loaded with_lora adapter stacked"], result.stderr[-2000:]


def test_several_adapters_are_switched_and_deleted():
    base = base_model()
    ids = token_ids(base.config)
    expected = base(ids).logits
    model = get_peft_model(base, adapter_config(num_streams=2))
    perturb(model)
    first = model(ids).logits
    model.add_adapter("second", adapter_config(num_streams=4, dynamic=False))
    assert torch.equal(model(ids).logits, first)
    model.set_adapter("second")
    assert torch.equal(model(ids).logits, expected)
    assert {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad} == {"bias"}
    perturb(model)
    second = model(ids).logits
    assert not torch.equal(second, first)
    model.set_adapter("default")
    assert torch.equal(model(ids).logits, first)
    with pytest.raises(ValueError, match=r"One adapter of hyper-connections can be active.*\['default', 'second'\]"):
        model.base_model.set_adapter(["default", "second"])
    model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert torch.equal(model(ids).logits, second)


# Every option away from its default, with the values that it may have where those are names.
AWAY = [
    {"num_streams": 3, "variant": "identity", "init": "paper", "readout": "sum"},
    {"num_streams": 3, "init": "paper", "readout": "norm_sum", "residual_logit": 2.0},
    {"variant": "mhc", "sinkhorn_iterations": 2, "eps": 1e-2},
    {"variant": "tbp", "stream_embedding": True, "residual_logit": 1.0},
    {"variant": "mhc_lite", "num_streams": 2, "dynamic": False, "readout": "softmax"},
    *({"variant": "hc", "readout": readout, "eps": 1e-3, "stream_embedding": True} for readout in LEARNED_READOUTS),
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


def test_adapters_with_and_without_learned_ends_are_switched():
    base = base_model()
    ids = token_ids(base.config)
    model = get_peft_model(base, adapter_config(num_streams=2), adapter_name="plain")
    model.add_adapter("ends", adapter_config(readout="attention", stream_embedding=True, init="identity"))
    outputs = {}
    for name in ("plain", "ends"):
        model.set_adapter(name)
        perturb(model)
        outputs[name] = model.eval()(ids).logits
    assert not torch.equal(outputs["plain"], outputs["ends"])
    for name in ("plain", "ends", "plain"):
        model.set_adapter(name)
        assert torch.equal(model(ids).logits, outputs[name])
    model.delete_adapter("ends")
    assert torch.equal(model(ids).logits, outputs["plain"])
    assert not [name for name, _ in model.named_parameters() if "expand_hc" in name or "readout_hc" in name]
    assert type(model.unload()) is type(base_model())


def test_merging_is_refused_with_the_reason():
    model = get_peft_model(base_model(), adapter_config())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="cannot be merged into the base model: they depend on the token"):
            merge()
    ids = token_ids(model.config)
    assert torch.equal(model(ids).logits, base_model()(ids).logits)


@pytest.mark.parametrize("options", [{"num_streams": 0}, {"num_streams": 7}, {"variant": "none"}, {"readout": "sum"}])
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match=r"num_streams|variant|readout"):
        adapter_config(**options)


def test_a_wrong_base_is_refused(tmp_path):
    model = get_peft_model(base_model(), adapter_config())
    model.save_pretrained(tmp_path)
    for wrong in (
        base_model("mistral"),
        base_model(num_hidden_layers=2),
        base_model(hidden_size=64),
    ):
        before = type(wrong.model.layers[0])
        with pytest.raises(ValueError, match="must be loaded on the base model that it was made for"):
            PeftModel.from_pretrained(wrong, tmp_path)
        assert type(wrong.model.layers[0]) is before
    with pytest.raises(ValueError, match="must be a plain model; KromHCLlamaForCausalLM has hyper-connections"):
        PeftModel.from_pretrained(retrofitted(), tmp_path)


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
    assert f"Use kromhc adapter {tmp_path / 'adapter'} {tmp_path / 'full'}." in " ".join(err.split())
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


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("method", "with peft_type 'KROMHC'; got 'LORA'"),
        ("base", "must name its base in base_model_name_or_path; got None. Give it with --base."),
        ("missing tensor", r"'model.layers.1.ffn_hc.bias' with shape [10], to fit KromHCLlamaForCausalLM; got None"),
        ("other shape", "'model.layers.0.attn_hc.bias' with shape"),
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


@pytest.mark.parametrize("first", ["kromhc_hf", "peft"])
def test_the_method_is_known_whichever_package_comes_first(first):
    imports = {"kromhc_hf": "from kromhc_hf import KromHCPeftConfig", "peft": "import peft"}
    lines = [imports.pop(first), *imports.values(), "from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING"]
    lines.append("print(KromHCPeftConfig().peft_type in PEFT_TYPE_TO_TUNER_MAPPING)")
    result = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "True"


def test_an_unsupported_family_is_refused():
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertLMHeadModel(BertConfig(**sizes, intermediate_size=16, is_decoder=True))
    with pytest.raises(ValueError, match="'bert' is not supported: the norm follows"):
        get_peft_model(bert, adapter_config())


def test_hyper_connections_cannot_be_applied_below_an_adapter():
    base = base_model()
    get_peft_model(base, adapter_config())
    with pytest.raises(ValueError, match="must not have an attribute 'attn_hc' yet"):
        apply_hyper_connections(base)


# -- stacked with LoRA


def lora_config() -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False, lora_alpha=2)


def test_lora_on_top_of_an_adapter():
    base = base_model()
    ids = token_ids(base.config)
    expected = base(ids).logits
    model = get_peft_model(base, adapter_config(), adapter_name="streams")
    perturb(model)
    streams_alone = model(ids).logits
    stacked = get_peft_model(model, lora_config(), adapter_name="low_rank")
    both = stacked(ids).logits
    assert not torch.equal(both, streams_alone)
    assert {p.requires_grad for n, p in stacked.named_parameters() if "hyper_connection_" in n or "lora_" in n} == {
        True
    }
    with stacked.disable_adapter():
        assert torch.equal(stacked(ids).logits, expected)
    assert torch.equal(stacked(ids).logits, both)


def test_two_adapter_files_on_one_base(tmp_path):
    """LoRA first, hyper-connections on the same base: each has a file of its own, which loads by itself too."""
    base = base_model()
    ids = token_ids(base.config)
    expected = base(ids).logits
    low_rank = get_peft_model(base, lora_config(), adapter_name="low_rank")
    lora_alone = low_rank(ids).logits
    model = get_peft_model(base, adapter_config(), adapter_name="streams")
    assert torch.equal(model(ids).logits, lora_alone)
    perturb(model)
    both = model(ids).logits
    model.save_pretrained(tmp_path)
    keys = {name: load_file(tmp_path / name / "adapter_model.safetensors").keys() for name in ("low_rank", "streams")}
    assert all("_hc.hyper_connection_adapters." in key for key in keys["streams"])
    assert all(".lora_" in key for key in keys["low_rank"])

    other = base_model()
    PeftModel.from_pretrained(other, tmp_path / "low_rank", adapter_name="low_rank")
    loaded = PeftModel.from_pretrained(other, tmp_path / "streams", adapter_name="streams")
    assert torch.equal(loaded(ids).logits, both)
    with loaded.disable_adapter():
        assert torch.equal(loaded(ids).logits, expected)
    with_lora = loaded.unload()
    assert not torch.equal(with_lora(ids).logits, expected)
    with pytest.raises(ValueError, match="The base must have no other adapters; got layers of type Linear"):
        adapter_to_model(model, "streams")
    with pytest.raises(ValueError, match="must be of a KromHCPeftConfig; got LoraConfig"):
        adapter_to_model(model, "low_rank")


# -- to a full model and back


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


def perturb_hyper_connections(model) -> None:
    from kromhc_hf import freeze_backbone

    perturb(freeze_backbone(model))


# -- in training, and without peft


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}], ids=["plain", "checkpointing"])
def test_trainer_trains_the_adapter_and_resumes_exactly(tmp_path, options):
    def trainer(folder, **more):
        return make_trainer(folder, get_peft_model(base_model(), adapter_config()), **options, **more)

    whole = trainer(tmp_path / "whole")
    whole.train()
    first = trainer(tmp_path / "halves", save_strategy="steps", save_steps=3)
    first.train()
    second = trainer(tmp_path / "halves", save_strategy="steps", save_steps=3)
    second.train(resume_from_checkpoint=str(tmp_path / "halves" / "checkpoint-3"))
    assert losses(second) == losses(whole)
    assert len(set(losses(whole))) == 6


def test_import_without_peft():
    result = run_python(
        """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "peft":
            raise ModuleNotFoundError(name)
import importlib.util
original = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "peft" else original(name, package)
sys.meta_path.insert(0, Missing())
import kromhc_hf
from kromhc_hf import StreamMetricsCallback
try:
    from kromhc_hf import KromHCPeftConfig
except ImportError as error:
    assert "pip install 'kromhc-hf[peft]'" in str(error), error
else:
    raise SystemExit("no error")
"""
    )
    assert result.returncode == 0, result.stderr[-2000:]
