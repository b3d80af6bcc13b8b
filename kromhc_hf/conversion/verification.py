"""Proof that a converted checkpoint computes what its base computes."""

import gc
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from .files import resolve_source
from .layerwise import LayerwiseModel
from .report import ConversionReport
from .sample_text import sample_tokens


# In fp32 sums of the same terms in another order differ in the last bits; in half precision nothing may differ.
LOSSLESS_FP32 = 2e-6


@torch.no_grad()
def verify_conversion(
    base: str | os.PathLike[str],
    converted: str | os.PathLike[str],
    *,
    text: str | None = None,
    max_tokens: int = 256,
    new_tokens: int = 32,
    dtype: torch.dtype | str = "auto",
    layers: str | Sequence[int] | None = None,
    report: ConversionReport | None = None,
) -> ConversionReport:
    """Runs a base model and its converted form on the same tokens and compares what comes out.

    With `layers`, the models are run one decoder layer at a time, which takes the memory of the embeddings, one layer
    and the head, and the output of every layer is compared too.

    Args:
        base: folder or Hub id of the base checkpoint.
        converted: folder or Hub id of the converted one.
        text: what to run them on; by default a short story. Without a tokenizer, random tokens are used.
        max_tokens: at most so many tokens, and never more than the model's context.
        new_tokens: length of the greedy continuation.
        dtype: to load both in; "auto" is the one they are stored in.
        layers: "all" to compare layer by layer, or the positions of some layers, such as `range(8, 12)`, which are then
            run on the embeddings as if there were no others. None runs the whole models in memory.
        report: a report to complete, as the conversion wrote it.

    Raises:
        ValueError: if `converted` has no hyper-connections, or there are no such layers.
        OSError: if one of the two cannot be loaded.
    """
    if layers is not None:
        return _verify_layers(base, converted, layers, text, max_tokens, dtype, report)
    base_logits, base_greedy, base_model, tokens, tokenizer = _run(base, None, text, max_tokens, new_tokens, dtype)
    logits, greedy, model, _, _ = _run(converted, tokens, text, max_tokens, new_tokens, dtype)
    report = report or _report(base, converted, base_model, model)
    return replace(
        _compared(report, base_logits, logits, model.config),
        dtype=str(base_model.dtype).removeprefix("torch."),
        tokens=tokens.numel(),
        text=tokenizer is not None,
        greedy_base=_spell(base_greedy, tokenizer),
        greedy_converted=_spell(greedy, tokenizer),
        lossless=_close(logits, base_logits, base_model.dtype) and torch.equal(base_greedy, greedy),
    )


def _verify_layers(
    base: str | os.PathLike[str],
    converted: str | os.PathLike[str],
    layers: str | Sequence[int],
    text: str | None,
    max_tokens: int,
    dtype: torch.dtype | str,
    report: ConversionReport | None,
) -> ConversionReport:
    """`verify_conversion` with one layer of one model in memory at a time."""
    model = LayerwiseModel(resolve_source(base), dtype)
    config, wanted = model.model.config, _positions(layers, len(model.layers))
    length = min(max_tokens, getattr(config, "max_position_embeddings", None) or max_tokens)
    tokens, tokenizer = sample_tokens(base, text, length, config.vocab_size)
    base_logits, base_states = model.run(tokens, wanted)
    other = LayerwiseModel(resolve_source(converted), model.dtype)
    report = report or _report(base, converted, model.model, other.model)
    logits, states = other.run(tokens, wanted)
    pairs = zip(wanted, states, base_states)
    different = (position for position, state, expected in pairs if not _close(state, expected, model.dtype))
    first = next(different, None)
    return replace(
        _compared(report, base_logits, logits, other.model.config),
        dtype=str(model.dtype).removeprefix("torch."),
        tokens=tokens.numel(),
        text=tokenizer is not None,
        lossless=first is None and _close(logits, base_logits, model.dtype),
        layers=tuple(wanted),
        first_different_layer=first,
    )


def _positions(layers: str | Sequence[int], count: int) -> list[int]:
    if layers == "all":
        return list(range(count))
    positions = [] if isinstance(layers, str) else sorted(set(layers))
    if not positions or positions[0] < 0 or positions[-1] >= count:
        raise ValueError(
            f"layers must be 'all' or positions from 0 to {count - 1}; got {layers!r}. Use for example range({count})."
        )
    return positions


def _close(values: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether two results are the same bits, or in fp32 as close as sums in another order are."""
    if torch.equal(values, expected):
        return True
    wide = dtype in (torch.float32, torch.float64)
    return wide and (values - expected).abs().max().item() <= LOSSLESS_FP32 * expected.abs().max().item()


def _report(base: Any, converted: Any, base_model: Any, model: Any) -> ConversionReport:
    """A report of what is known without running the models."""
    config = model.config
    if not hasattr(config, "hc_num_streams"):
        raise ValueError(
            f"the second model must have hyper-connections; got model_type {config.model_type!r} in {converted}. "
            "Give the base first and the converted checkpoint second."
        )
    base_names = base_model.state_dict().keys()
    added = [tensor for name, tensor in model.state_dict().items() if name not in base_names]
    return ConversionReport.of(
        base,
        converted,
        config,
        base_tensors=len(base_names),
        added_parameters=sum(tensor.numel() for tensor in added),
        added_bytes=sum(tensor.nbytes for tensor in added),
    )


def _compared(report: ConversionReport, base_logits: Tensor, logits: Tensor, config: Any) -> ConversionReport:
    """The report with the numbers of two sets of logits."""
    log_base, log_converted = base_logits.double().log_softmax(-1), logits.double().log_softmax(-1)
    return replace(
        report,
        bitwise_equal=torch.equal(logits, base_logits),
        max_logit_difference=(logits - base_logits).abs().max().item(),
        max_logit=base_logits.abs().max().item(),
        mean_kl=F.kl_div(log_converted, log_base, reduction="none", log_target=True).sum(-1).mean().item(),
        top1_agreement=(log_base.argmax(-1) == log_converted.argmax(-1)).double().mean().item(),
        lossless_init=config.hc_init == "identity",
    )


def _run(
    checkpoint: str | os.PathLike[str],
    tokens: Tensor | None,
    text: str | None,
    max_tokens: int,
    new_tokens: int,
    dtype: torch.dtype | str,
) -> tuple[Tensor, Tensor, Any, Tensor, Any]:
    """Logits in fp32, greedy continuation, the model, the tokens `[1, S]` and the tokenizer that made them."""
    gc.collect()
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    tokenizer = None
    if tokens is None:
        context = getattr(model.config, "max_position_embeddings", None) or max_tokens
        tokens, tokenizer = sample_tokens(checkpoint, text, min(max_tokens, context), model.config.vocab_size)
    logits = model(tokens).logits
    prompt = tokens[:, : max(1, min(tokens.shape[1] // 2, 16))]
    room = (getattr(model.config, "max_position_embeddings", None) or max_tokens) - prompt.shape[1]
    greedy = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=min(new_tokens, room),
        do_sample=False,
        pad_token_id=model.config.pad_token_id or 0,
    )
    assert tokens is not None
    return logits.float(), greedy, model, tokens, tokenizer


def _spell(tokens: Tensor, tokenizer: Any) -> str:
    ids = tokens[0].tolist()
    return tokenizer.decode(ids, skip_special_tokens=True) if tokenizer else " ".join(map(str, ids))
