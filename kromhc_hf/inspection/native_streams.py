"""Families that have several residual streams from birth, and how what their branches do is read from their modules.

The mixing matrix is given as everywhere in this package: `out[i] = sum_j h_res[i, j] in[j]`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class BranchRecord(NamedTuple):
    """The mappings of one residual branch and the streams that they were computed from."""

    h_pre: Tensor  # [B, S, n]
    h_post: Tensor  # [B, S, n]
    h_res: Tensor  # [B, S, n, n]
    streams: Tensor  # [B, S, n, C]


# The record of a branch, from its module with the module's input and output.
Reader = Callable[[Any, Tensor, Any], BranchRecord]
# What a recomputed read may differ by, relative to the largest value: a few roundings of bfloat16.
READ_TOLERANCE = 2.0**-5


@dataclass(frozen=True)
class NativeStreams:
    """How a family with streams of its own is read.

    Args:
        variant: what its hyper-connections are.
        said: what a reader must know about the weights that are shown.
        num_streams: the field of its configuration that has their number.
        read: makes the record of a branch.
        names: where a decoder layer has the module of each branch, by the branch's name in records.
    """

    variant: str
    said: str
    num_streams: str
    read: Reader
    names: Mapping[str, str]


def native_streams(config: Any) -> NativeStreams | None:
    """How the text model of a configuration is read; None for one that has no streams of its own."""
    return NATIVE_STREAMS.get(config.get_text_config().model_type)


def native_branches(model: nn.Module) -> dict[str, tuple[nn.Module, Reader]]:
    """The modules of the branches and how they are read, in order, under names such as `layers.0.attn_hc`."""
    configs = (part.config for part in model.modules() if isinstance(part, PreTrainedModel))
    native = next(filter(None, map(native_streams, configs)), None)
    if native is None:
        return {}
    found: dict[str, tuple[nn.Module, Reader]] = {}
    for path, layer in model.named_modules():
        for name, own in native.names.items():
            module = getattr(layer, own, None)
            if isinstance(module, nn.Module):
                found[".".join([*path.split(".")[-2:], name])] = module, native.read
    return found


def _weighted(streams: Tensor, h_pre: Tensor) -> Tensor:
    return (h_pre.float().unsqueeze(-1) * streams.float()).sum(-2)


def _identity(streams: Tensor) -> Tensor:
    *outer, n, _ = streams.shape
    return torch.eye(n, device=streams.device).expand(*outer, n, n)


def _checked(record: BranchRecord, recomputed: Tensor, read: Tensor, module: nn.Module) -> BranchRecord:
    """The record, if its read weights give what the module read."""
    wide = read.float()
    if wide.shape != recomputed.shape or (recomputed - wide).abs().max() > READ_TOLERANCE * wide.abs().max():
        raise ValueError(
            f"the read weights of {type(module).__name__} must give what it read; they do not. This release of "
            "transformers computes them otherwise; use 5.24."
        )
    return record


def _read_weights(module: Any, logits: Tensor) -> Tensor:
    n = module.hc_mult
    return torch.sigmoid(logits * module.scale[0] + module.base[:n]) + module.hc_eps


def _read_mixed(module: Any, streams: Tensor, output: Any) -> BranchRecord:
    """DeepSeek-V4 and GLM-5-Next: a constrained matrix, which the layer applies transposed."""
    h_post, comb, read = output
    flat = module.input_norm(streams.flatten(2).float())
    h_pre = _read_weights(module, nn.functional.linear(flat, module.fn[: module.hc_mult].float()))
    record = BranchRecord(h_pre, h_post, comb.mT, streams)
    return _checked(record, _weighted(streams, h_pre), read, module)


def _read_unmixed(module: Any, streams: Tensor, output: Any) -> BranchRecord:
    """HY-V4: streams that are read and written, and not mixed."""
    h_post, read = output
    with torch.autocast(streams.device.type, enabled=False):
        flat = streams.flatten(2).float()
        # Its norm gives the factor alone.
        logits = nn.functional.linear(flat, module.fn[: module.hc_mult].float()) * module.input_norm(flat)
        h_pre = _read_weights(module, logits)
    record = BranchRecord(h_pre, h_post, _identity(streams), streams)
    return _checked(record, _weighted(streams, h_pre), read, module)


def _read_gated(module: Any, streams: Tensor, output: Any) -> BranchRecord:
    """Qwen4-Exp: streams side by side in `[B, S, n * C]`, a read weight for every channel, and no mixing."""
    read, _, h_post = output
    n = module.hc_count
    normed = module.hc_norm(streams)
    hidden = nn.functional.silu(module.input_mix_weight_down(normed) / n)
    gate, normed = (
        part.unflatten(-1, (n, -1)).float() for part in (module.input_mix_weight_up(hidden).sigmoid(), normed)
    )
    apart = streams.unflatten(-1, (n, -1))
    record = BranchRecord(gate.mean(-1) / n, h_post, _identity(apart), apart)
    return _checked(record, (gate * normed).mean(-2), read, module)


_ATTN_AND_FFN = {"attn_hc": "attn_hc", "ffn_hc": "ffn_hc"}
_MIXED = NativeStreams(
    variant="mhc, from birth",
    said="H_res is the transpose of its own matrix, so that row i says where stream i comes from",
    num_streams="hc_mult",
    read=_read_mixed,
    names=_ATTN_AND_FFN,
)
# By the model type of the text model.
NATIVE_STREAMS: dict[str, NativeStreams] = {
    "deepseek_v4": _MIXED,
    "glm5_next_text": _MIXED,
    "hy_v4": NativeStreams(
        variant="unmixed, from birth",
        said="the streams are not mixed: H_res is the identity",
        num_streams="hc_mult",
        read=_read_unmixed,
        names=_ATTN_AND_FFN,
    ),
    "qwen4_exp_text": NativeStreams(
        variant="gated read, from birth",
        said="the streams are not mixed: H_res is the identity; a read weight of its own for every channel of every "
        "normed stream: H_pre is their mean over channels",
        num_streams="hc_count",
        read=_read_gated,
        names={"attn_hc": "attn_hyper_connection", "ffn_hc": "mlp_hyper_connection"},
    ),
}
# With the model types that have one of them inside.
NATIVE_MODEL_TYPES = {*NATIVE_STREAMS, *(model_type.removesuffix("_text") for model_type in NATIVE_STREAMS)}
