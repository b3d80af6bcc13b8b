"""Weight-only quantisation: the backbone's matrices shrink, hyper-connections stay in fp32, the result reloads."""

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from quantised.check import CHECKS, Case, checked
from quantised.run import BEGIN, END, left_out, shown
from quantised.schemes import SCHEMES as STORED
from quantised.schemes import Scheme, packed, replaced
from support.composite import composite_configuration
from support.runs import retrofitted
from support.tiny import configurations, make_model, token_ids
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig, TorchAoConfig
from transformers.integrations.awq import AWQ_SCALES_MAPPINGS

from kromhc_hf import KromHCConfig, convert_checkpoint, hyper_connection_state_dict, verify_conversion
from kromhc_hf.conversion.layerwise import LayerwiseModel


SCHEMES = [
    pytest.param(lambda: TorchAoConfig(Int8WeightOnlyConfig()), id="torchao-int8"),
    pytest.param(lambda: BitsAndBytesConfig(load_in_8bit=True), id="bitsandbytes-int8"),
    pytest.param(lambda: BitsAndBytesConfig(load_in_4bit=True), id="bitsandbytes-4bit"),
]
pytestmark = pytest.mark.filterwarnings("ignore")


def is_quantized(module: torch.nn.Module) -> bool:
    return type(module.weight.data) is not torch.Tensor or module.weight.dtype in (torch.int8, torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantised_models_keep_hyper_connections_in_float32(tmp_path, scheme, dtype):
    full = retrofitted()
    full.save_pretrained(tmp_path / "full")
    make_model(configurations("llama")[0]).save_pretrained(tmp_path / "base")
    options = {"quantization_config": scheme(), "dtype": dtype}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full", **options)
    assert is_quantized(model.model.layers[0].mlp.up_proj)
    for name, tensor in hyper_connection_state_dict(model).items():
        assert type(tensor) is torch.Tensor
        assert tensor.dtype is torch.float32
        assert torch.equal(tensor, hyper_connection_state_dict(full)[name])
    ids = token_ids(model.config)
    logits = model(ids).logits
    # Equal streams stay equal, so the quantised model is bitwise the quantised base.
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)
    assert torch.equal(logits, base(ids).logits)
    model.save_pretrained(tmp_path / "quantised")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised", dtype=dtype)
    assert is_quantized(again.model.layers[0].mlp.up_proj)
    assert {tensor.dtype for tensor in hyper_connection_state_dict(again).values()} == {torch.float32}
    assert torch.equal(again(ids).logits, logits)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_hyper_connections_train_on_a_quantised_backbone(tmp_path, scheme):
    from peft import get_peft_model, prepare_model_for_kbit_training

    from kromhc_hf import KromHCPeftConfig

    make_model(configurations("llama")[0]).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=scheme())
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    ids = token_ids(base.config)
    model = get_peft_model(base, KromHCPeftConfig(task_type="CAUSAL_LM")).train()
    model(ids, labels=ids).loss.backward()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trainable) == 3 * 2 * 3
    assert all(parameter.grad.dtype is torch.float32 and parameter.grad.isfinite().all() for parameter in trainable)
    assert sum(parameter.grad.abs().max() > 0 for parameter in trainable) >= 3 * 2


@pytest.mark.parametrize("name", ["fp8", "mxfp8", "mxfp4"])
def test_layers_are_unpacked_to_the_numbers_of_the_whole_model(name, tmp_path):
    base = Case(STORED[name], tmp_path).base()
    ids = token_ids(base.config)[:1]
    by_layers, _ = LayerwiseModel(tmp_path / "base").run(ids, range(base.config.num_hidden_layers))
    assert torch.equal(by_layers, base(ids).logits.float())


@pytest.mark.parametrize("name", ["bitsandbytes nf4", "torchao int8", "fp8", "mxfp8", "mxfp4"])
def test_a_stored_base_goes_the_whole_way(name, tmp_path):
    """What `make quantised` checks of every method, for those whose packages are here."""
    for check, outcome in checked(STORED[name], tmp_path).items():
        assert outcome is None or outcome.passed or outcome.native, (check, outcome)
    assert set(CHECKS) >= {"files", "layers", "training"}


def test_a_base_that_cannot_run_here_is_converted_and_not_verified(tmp_path):
    scheme = Scheme("fbgemm_fp8", replaced({"quant_method": "fbgemm_fp8"}, packed("weight", "weight_scale")))
    outcomes = checked(scheme, tmp_path)
    assert outcomes["files"].passed
    assert outcomes["logits"].native
    with pytest.raises(ValueError, match=r"quantised \(fbgemm_fp8\), which does not run here: .* GPU.* Converting it"):
        verify_conversion(tmp_path / "base", tmp_path / "out")


def test_every_method_has_a_scheme_and_the_page_shows_what_was_found():
    page = Path(__file__).resolve().parents[1] / "docs" / "quantised-bases.md"
    content = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert page.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip() == shown(content)
    assert list(content["schemes"]) == list(STORED)
    assert left_out() == []


@pytest.mark.parametrize("pattern", [r"re:model\.layers\..*", r"re:.*weight", r"re:.*(attn|readout).*"])
def test_no_pattern_of_a_user_quantises_hyper_connections(pattern, tmp_path):
    full = retrofitted(readout="softmax")
    full.save_pretrained(tmp_path)
    options = TorchAoConfig(FqnToConfig(OrderedDict({pattern: Int8WeightOnlyConfig()})))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=options)
    assert is_quantized(model.model.layers[0].self_attn.q_proj)
    for name, tensor in hyper_connection_state_dict(model).items():
        assert type(tensor) is torch.Tensor, name
        assert torch.equal(tensor, hyper_connection_state_dict(full)[name])


@pytest.mark.parametrize("model_type", ["bloom", "falcon", "gpt_neox", "starcoder2"])
def test_awq_scales_the_activations_that_it_scales_in_the_base(model_type):
    """Where it does goes by the model type."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(KromHCConfig(backbone_config=configurations(model_type)[0]))
    assert AWQ_SCALES_MAPPINGS[model.config.model_type] == AWQ_SCALES_MAPPINGS[model_type]


def test_a_base_of_text_and_images(tmp_path):
    torch.manual_seed(0)
    config = composite_configuration("llava")
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "full")
    options = TorchAoConfig(Int8WeightOnlyConfig())
    small = AutoModelForImageTextToText.from_pretrained(tmp_path / "full", quantization_config=options)
    small.save_pretrained(tmp_path / "base")
    convert_checkpoint(tmp_path / "base", tmp_path / "out")
    for layers in (None, "all"):
        report = verify_conversion(tmp_path / "base", tmp_path / "out", layers=layers, max_tokens=16, new_tokens=2)
        assert report.bitwise_equal
        assert report.image
