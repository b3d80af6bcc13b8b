"""Weight-only quantisation: the backbone's matrices shrink, hyper-connections stay in fp32, the result reloads."""

import pytest
import torch
from support.runs import retrofitted
from support.tiny import configurations, make_model, token_ids
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from kromhc_hf import hyper_connection_state_dict


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
