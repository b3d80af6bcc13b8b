"""Quantised checkpoints of a tiny llama, one for each method and format.

A method that quantises a model while loading it makes its own. One that wants data or a GPU for that gets a checkpoint
of random numbers in its format: what they are does not matter where two models that hold the same are compared.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.tiny import COMMON, make_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_utils import get_hf_quantizer


GROUP = 32
SIZES = {**COMMON, "hidden_size": 64, "intermediate_size": 128}


def configuration() -> LlamaConfig:
    """What divides into the groups and blocks of every method."""
    return LlamaConfig(**SIZES)


@dataclass(frozen=True)
class Scheme:
    """A method in one of its formats.

    Args:
        method: what transformers calls it.
        make: writes a quantised base into a folder, given the folder of the full one.
        live: the configuration that quantises while loading, for methods that do that but save nothing.
        configuration: of the full model.
    """

    method: str
    make: Callable[[Path, Path], None] | None = None
    live: Callable[[], Any] | None = None
    configuration: Callable[[], Any] = configuration


def on_the_fly(options: Callable[[], Any], dtype: torch.dtype = torch.float32) -> Callable[[Path, Path], None]:
    """Quantised by transformers while it loads the full model, and saved."""

    def make(full: Path, folder: Path) -> None:
        AutoModelForCausalLM.from_pretrained(full, quantization_config=options(), dtype=dtype).save_pretrained(folder)

    return make


def random_like(name: str, tensor: Tensor) -> Tensor:
    """Numbers that a packed weight, a scale or an index may have."""
    if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return torch.randn(tensor.shape).to(tensor.dtype)
    if tensor.is_floating_point():
        small = 0.02 if "scale" in name or "embed" in name else 0.2
        return (small * torch.rand(tensor.shape)).to(tensor.dtype)
    if tensor.dtype is torch.bool:
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    info = torch.iinfo(tensor.dtype)
    return torch.randint(info.min, info.max, tensor.shape, dtype=tensor.dtype)


def filled(
    settings: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    fixed: Callable[[str, Tensor], Tensor | None] = lambda name, tensor: None,
) -> Callable[[Path, Path], None]:
    """Random numbers in the places that the quantiser makes in an empty model.

    Args:
        settings: `quantization_config` as it stands in config.json.
        dtype: of the model.
        fixed: tensors that must not be random.
    """

    def make(full: Path, folder: Path) -> None:
        config = configuration()
        config.quantization_config = settings
        quantizer, config, device_map = get_hf_quantizer(config, None, None, True, {})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(configuration(), dtype=dtype)
            model.config.quantization_config = quantizer.quantization_config
            quantizer.preprocess_model(model=model, dtype=dtype, device_map=device_map, checkpoint_files=None)
        torch.manual_seed(0)
        shapes = {name: tensor.shape for name, tensor in make_model(configuration()).state_dict().items()}
        tensors = {}
        for name, tensor in model.state_dict().items():
            given = torch.tensor(shapes[name.removesuffix("_shape")]) if name.endswith("weight_shape") else None
            given = fixed(name, tensor) if given is None else given
            tensors[name] = random_like(name, tensor) if given is None else given
        write(folder, settings, tensors, dtype)

    return make


def replaced(
    settings: dict[str, Any], weights: Callable[[str, nn.Linear], dict[str, Tensor]], dtype: torch.dtype = torch.float32
) -> Callable[[Path, Path], None]:
    """Every linear layer but the head as tensors of other names.

    Args:
        settings: `quantization_config` as it stands in config.json.
        weights: the tensors of a layer, by their names in it.
        dtype: of everything else.
    """

    def make(full: Path, folder: Path) -> None:
        torch.manual_seed(0)
        model = make_model(configuration(), dtype)
        tensors = dict(model.state_dict())
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear) and path != "lm_head":
                del tensors[f"{path}.weight"]
                tensors.update((f"{path}.{name}", tensor) for name, tensor in weights(path, module).items())
        write(folder, settings, tensors, dtype)

    return make


def write(folder: Path, settings: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """A checkpoint as it lies on the Hub."""
    config = configuration()
    config.architectures, config.dtype = ["LlamaForCausalLM"], dtype
    config.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(content))
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def block_fp8(_: str, module: nn.Linear) -> dict[str, Tensor]:
    rows, columns = module.weight.shape
    return {
        "weight": module.weight.detach().to(torch.float8_e4m3fn),
        "weight_scale_inv": 0.5 + torch.rand(-(-rows // GROUP), -(-columns // GROUP)),
    }


def block_mxfp8(_: str, module: nn.Linear) -> dict[str, Tensor]:
    """A power of two for 32 numbers, as a byte."""
    rows, columns = module.weight.shape
    return {
        "weight": module.weight.detach().to(torch.float8_e4m3fn),
        "weight_scale_inv": torch.randint(126, 129, (rows, columns // 32), dtype=torch.uint8),
    }


def affine(_: str, module: nn.Linear) -> dict[str, Tensor]:
    """Eight numbers of 4 bits in an integer, a factor and a summand for each group."""
    rows, columns = module.weight.shape
    return {
        "weight": torch.randint(2**32, (rows, columns // 8)).to(torch.uint32),
        "scales": 0.02 * torch.rand(rows, columns // GROUP),
        "qbiases": -0.15 * torch.rand(rows, columns // GROUP),
    }


def torchao(name: str, **options: Any) -> Callable[[], Any]:
    def options_of() -> Any:
        from torchao import quantization
        from transformers import TorchAoConfig

        return TorchAoConfig(getattr(quantization, name)(**options))

    return options_of


def bitsandbytes(**options: Any) -> Callable[[], Any]:
    def options_of() -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(**options)

    return options_of


def named(name: str, **options: Any) -> Callable[[], Any]:
    def options_of() -> Any:
        import transformers

        return getattr(transformers, name)(**options)

    return options_of


def compressed(format_: str, inputs: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format_,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        "kv_cache_scheme": None,
    }


INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
INT8_INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
GROUPS = {"bits": 4, "group_size": GROUP}
GPTQ = {"quant_method": "gptq", **GROUPS, "desc_act": False, "sym": True, "checkpoint_format": "gptq"}
AWQ = {"quant_method": "awq", **GROUPS, "zero_point": True, "version": "gemm", "format": "gemm"}
AUTO_ROUND = {"quant_method": "auto-round", **GROUPS, "sym": True, "packing_format": "auto_round:auto_gptq"}
AQLM = {"quant_method": "aqlm", "in_group_size": 8, "out_group_size": 1, "num_codebooks": 1, "nbits_per_codebook": 8}
METAL = {"quant_method": "metal", **GROUPS}
MXFP8 = {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [GROUP, GROUP], "activation_scheme": "dynamic"}


def groups(name: str, tensor: Tensor) -> Tensor | None:
    """Which group every input belongs to."""
    if name.endswith("g_idx"):
        return torch.arange(tensor.numel(), dtype=tensor.dtype) // GROUP
    return None


def packed(*names: str) -> Callable[[str, nn.Linear], dict[str, Tensor]]:
    """Integers and scales by the names that a method stores, where only a GPU could say more of them."""

    def weights(_: str, module: nn.Linear) -> dict[str, Tensor]:
        kinds = [torch.int32, *(torch.float16 for _ in names[1:])]
        return {name: random_like(name, torch.empty(8, 8, dtype=kind)) for name, kind in zip(names, kinds)}

    return weights


def gpt_oss() -> Any:
    from support.tiny import configurations

    fields = configurations("gpt_oss")[0].to_dict()
    return configurations("gpt_oss")[0].__class__(**{**fields, "hidden_size": 64, "intermediate_size": 64})


def mxfp4(full: Path, folder: Path) -> None:
    """The experts of gpt-oss in blocks of 32 numbers with one scale."""
    model = AutoModelForCausalLM.from_pretrained(full, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, rows, columns = tensors.pop(name).transpose(1, 2).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 122, (experts, rows, columns // 32), dtype=torch.uint8)
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
    (folder / "config.json").write_text(json.dumps(content))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


SCHEMES = {
    "bitsandbytes 8 bit": Scheme("bitsandbytes", on_the_fly(bitsandbytes(load_in_8bit=True))),
    "bitsandbytes nf4": Scheme("bitsandbytes", on_the_fly(bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"))),
    "bitsandbytes fp4, double": Scheme(
        "bitsandbytes", on_the_fly(bitsandbytes(load_in_4bit=True, bnb_4bit_use_double_quant=True), torch.bfloat16)
    ),
    "torchao int8": Scheme("torchao", on_the_fly(torchao("Int8WeightOnlyConfig"))),
    "torchao int8, dynamic": Scheme("torchao", on_the_fly(torchao("Int8DynamicActivationInt8WeightConfig"))),
    "torchao float8": Scheme("torchao", on_the_fly(torchao("Float8WeightOnlyConfig"))),
    "torchao int4": Scheme("torchao", on_the_fly(torchao("Int4WeightOnlyConfig", group_size=32), torch.bfloat16)),
    "fp8": Scheme("fp8", replaced(BLOCKS, block_fp8, torch.bfloat16)),
    "compressed-tensors int4": Scheme("compressed-tensors", filled(compressed("pack-quantized", **INT4))),
    "compressed-tensors int8": Scheme("compressed-tensors", filled(compressed("int-quantized", INT8_INPUTS, **INT8))),
    "compressed-tensors fp8": Scheme("compressed-tensors", filled(compressed("float-quantized", **FP8))),
    "gptq": Scheme("gptq", filled(GPTQ, fixed=groups)),
    "awq": Scheme("awq", filled(AWQ, fixed=groups)),
    "auto-round": Scheme("auto-round", filled(AUTO_ROUND, fixed=groups)),
    "bitnet": Scheme("bitnet", filled({"quant_method": "bitnet", "quantization_mode": "offline"}, torch.bfloat16)),
    "gemma": Scheme("gemma", filled({"quant_method": "gemma"}, torch.bfloat16)),
    "aqlm": Scheme("aqlm", filled(AQLM)),
    "quanto int8": Scheme("quanto", live=named("QuantoConfig", weights="int8")),
    "hqq": Scheme("hqq", live=named("HqqConfig", nbits=4, group_size=GROUP)),
    "mxfp4": Scheme("mxfp4", mxfp4, configuration=gpt_oss),
    "sinq": Scheme("sinq", live=named("SinqConfig", nbits=4, group_size=GROUP)),
    "eetq": Scheme("eetq", replaced({"quant_method": "eetq"}, packed("weight", "weight_scales"))),
    "fbgemm_fp8": Scheme("fbgemm_fp8", replaced({"quant_method": "fbgemm_fp8"}, packed("weight", "weight_scale"))),
    "higgs": Scheme("higgs", replaced({"quant_method": "higgs"}, packed("weight", "scales", "tables", "tables2"))),
    "vptq": Scheme("vptq", replaced({"quant_method": "vptq"}, packed("indices", "centroids.weight", "perm"))),
    "spqr": Scheme("spqr", replaced({"quant_method": "spqr"}, packed("row_offsets", "dense_weights", "col_vals"))),
    "fp_quant": Scheme("fp_quant", replaced({"quant_method": "fp_quant"}, packed("qweight", "scales"))),
    "quark": Scheme("quark", replaced({"quant_method": "quark"}, packed("weight", "weight_scale"))),
    "metal": Scheme("metal", replaced(METAL, affine)),
    "fouroversix": Scheme("fouroversix", replaced({"quant_method": "fouroversix"}, packed("weight", "weight_scale"))),
    "mxfp8": Scheme("mxfp8", replaced(MXFP8, block_mxfp8, torch.bfloat16)),
    "nvfp4": Scheme("nvfp4", live=named("NVFP4Config")),
}
