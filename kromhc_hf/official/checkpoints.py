"""Whole checkpoints of the authors' nanoGPT-style repositories, turned into a KromHC GPT-2 that computes the same."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config

from ..modeling.configuration_kromhc import KromHCConfig
from ..modeling.modeling_kromhc import KromHCForCausalLM
from .modules import import_reference_state_dict


# Official name of a sublayer -> name in GPT-2. Blocks keep their branches as Sequential(norm, sublayer).
SUBLAYERS = {
    "branch_attn.0": "ln_1",
    "branch_attn.1.c_attn": "attn.c_attn",
    "branch_attn.1.c_proj": "attn.c_proj",
    "branch_mlp.0": "ln_2",
    "branch_mlp.1.c_fc": "mlp.c_fc",
    "branch_mlp.1.c_proj": "mlp.c_proj",
}
HYPER_CONNECTIONS = {"hc_attn": "attn_hc", "hc_mlp": "ffn_hc"}
# The hyper-connections hold their branch as well: the same tensors by another name.
REPEATED = ("hc_attn.branch.", "hc_mlp.branch.")
COMPILED_PREFIX = "_orig_mod."


def import_reference_checkpoint(state_dict: Mapping[str, Tensor], *, num_heads: int, variant: str = "kromhc") -> Any:
    """The model with the weights of an official nanoGPT-style checkpoint (arXiv 2601.05732, 2601.21579).

    Agrees with the official model to rounding: its streams are summed after the final norm (readout "norm_sum"), its
    activation is the exact GELU, and its blocks are those of GPT-2. A float64 state dict gives a float64 model.

    Args:
        state_dict: the "model" entry of the checkpoint: `transformer.wte.weight`, `transformer.wpe.weight`,
            `transformer.h.<i>.branch_attn`, `.branch_mlp`, `.hc_attn`, `.hc_mlp`, `transformer.ln_f.weight`.
        num_heads: number of attention heads, `n_head` in the "model_args" entry; the tensors do not tell.
        variant: "kromhc", "mhc", "mhc_lite" or "hc".

    Raises:
        ValueError: if a tensor is missing or unknown.
    """
    tensors = {
        name.removeprefix(COMPILED_PREFIX): tensor
        for name, tensor in state_dict.items()
        if not any(repeated in name for repeated in REPEATED) and not name.endswith("attn.bias")
    }
    renamed = {}
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        prefix, parameter = _rename(name)
        if parameter.startswith(tuple(HYPER_CONNECTIONS.values())):
            module, _, rest = parameter.partition(".")
            modules.setdefault(f"{prefix}{module}", {})[rest] = tensor
        else:
            # GPT-2 stores its linear maps transposed.
            renamed[prefix + parameter] = tensor.T if ".c_" in parameter and tensor.dim() == 2 else tensor
    if not modules:
        raise ValueError("the checkpoint must have hyper-connections, hc_attn and hc_mlp in every block; found none.")
    for module, official in modules.items():
        imported = import_reference_state_dict(official, variant=variant)
        renamed |= {f"{module}.{name}": tensor for name, tensor in imported.state_dict().items()}

    model: Any = KromHCForCausalLM(_configuration(renamed, imported.num_streams, imported.eps, num_heads, variant))
    model = model.to(renamed["transformer.wte.weight"].dtype).eval()
    return _loaded(model, renamed)


def _rename(name: str) -> tuple[str, str]:
    """`transformer.h.3.branch_mlp.0.weight` -> `("transformer.h.3.", "ln_2.weight")`; other names stay."""
    parts = name.split(".")
    if parts[:2] != ["transformer", "h"]:
        return "", name
    prefix, rest = ".".join(parts[:3]) + ".", ".".join(parts[3:])
    for official, ours in {**SUBLAYERS, **HYPER_CONNECTIONS}.items():
        if rest.startswith(official + "."):
            return prefix, ours + rest.removeprefix(official)
    raise ValueError(
        f"every tensor of a block must belong to {', '.join((*SUBLAYERS, *HYPER_CONNECTIONS))}; got {name!r}. "
        "Rename the tensors of other repositories first."
    )


def _configuration(tensors: Mapping[str, Tensor], num_streams: int, eps: float, num_heads: int, variant: str) -> Any:
    vocabulary, hidden_size = tensors["transformer.wte.weight"].shape
    backbone = GPT2Config(
        vocab_size=vocabulary,
        n_embd=hidden_size,
        n_positions=tensors["transformer.wpe.weight"].shape[0],
        n_layer=1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("transformer.h.")),
        n_head=num_heads,
        n_inner=tensors["transformer.h.0.mlp.c_fc.weight"].shape[1],
        activation_function="gelu",
        layer_norm_epsilon=1e-5,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return KromHCConfig(
        backbone_config=backbone,
        hc_num_streams=num_streams,
        hc_variant=variant,
        hc_init="paper",
        hc_readout="norm_sum",
        hc_eps=eps,
    )


def _loaded(model: Any, tensors: dict[str, Tensor]) -> Any:
    """The model with these tensors; biases that the official model was trained without are 0."""
    for name, parameter in model.state_dict().items():
        if name not in tensors and name.endswith(".bias") and "_hc." not in name:
            tensors[name] = torch.zeros_like(parameter)
    tensors.setdefault("lm_head.weight", tensors["transformer.wte.weight"])
    missing, unknown = model.load_state_dict(tensors, strict=False)
    if missing or unknown:
        raise ValueError(
            f"the checkpoint must hold every tensor of the model and no other; missing: "
            f"{', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}."
        )
    return model
