"""Proof that a converted checkpoint computes what its base computes."""

import gc
import os
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


# In fp32 sums of the same terms in another order differ in the last bits; in half precision nothing may differ.
LOSSLESS_FP32 = 2e-6

SAMPLE_TEXT = """Once upon a time there was a lighthouse keeper who read to the ships. Every evening, when the lamp was
lit, he took a book from the shelf, opened the window, and read one chapter aloud into the wind. The sailors could not
hear him, of course. The sea was much too loud for that. But they knew the hour, and they knew the light, and some of
them had brought him a book the year before. "What is it tonight?" asked the cook of a small grey ship. The captain
looked up at the lamp through the rain. "Something with a happy end," he said. "See how steady it burns." And they all
went below, and had soup, and slept until the morning."""


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion added, and how the converted model compares with its base.

    The second half is None until the two have been run on the same tokens.

    Args:
        source: base checkpoint.
        destination: converted checkpoint.
        model_type: of the converted model.
        num_streams, variant, init: of the hyper-connections.
        base_tensors: number of tensors taken over unchanged.
        added_parameters: number of hyper-connection parameters.
        added_bytes: their size.
        dtype: in which both models ran.
        tokens: number of tokens compared.
        text: whether they were real text (a tokenizer was there) or random.
        bitwise_equal: whether all logits are the same bits.
        max_logit_difference: largest |logit difference|.
        max_logit: largest |logit| of the base, the scale of the difference.
        mean_kl: mean over tokens of KL(base || converted), nats.
        top1_agreement: share of tokens with the same most likely next token.
        greedy_base, greedy_converted: greedy continuation of both, text or token ids.
        lossless_init: whether the init promises an unchanged function.
        lossless: bitwise equal, or in fp32 within 2e-6 of the largest logit, and the same greedy continuation.
    """

    source: str
    destination: str
    model_type: str
    num_streams: int
    variant: str
    init: str
    base_tensors: int
    added_parameters: int
    added_bytes: int
    dtype: str | None = None
    tokens: int | None = None
    text: bool | None = None
    bitwise_equal: bool | None = None
    max_logit_difference: float | None = None
    max_logit: float | None = None
    mean_kl: float | None = None
    top1_agreement: float | None = None
    greedy_base: str | None = None
    greedy_converted: str | None = None
    lossless_init: bool | None = None
    lossless: bool | None = None

    @property
    def passed(self) -> bool:
        """False only where an init that promises an unchanged function did not keep it."""
        return not (self.lossless_init and self.lossless is False)

    def to_dict(self) -> dict[str, Any]:
        """All fields and `passed`, ready for JSON."""
        return {**asdict(self), "passed": self.passed}


@torch.no_grad()
def verify_conversion(
    base: str | os.PathLike[str],
    converted: str | os.PathLike[str],
    *,
    text: str | None = None,
    max_tokens: int = 256,
    new_tokens: int = 32,
    dtype: torch.dtype | str = "auto",
    report: ConversionReport | None = None,
) -> ConversionReport:
    """Runs a base model and its converted form on the same tokens and compares what comes out.

    Args:
        base: folder or Hub id of the base checkpoint.
        converted: folder or Hub id of the converted one.
        text: what to run them on; by default a short story. Without a tokenizer, random tokens are used.
        max_tokens: at most so many tokens, and never more than the model's context.
        new_tokens: length of the greedy continuation.
        dtype: to load both in; "auto" is the one they are stored in.
        report: a report to complete, as the conversion wrote it.

    Raises:
        ValueError: if `converted` has no hyper-connections.
        OSError: if one of the two cannot be loaded.
    """
    base_logits, base_greedy, base_model, tokens, tokenizer = _run(base, None, text, max_tokens, new_tokens, dtype)
    logits, greedy, model, _, _ = _run(converted, tokens, text, max_tokens, new_tokens, dtype)
    config = model.config
    if not hasattr(config, "hc_num_streams"):
        raise ValueError(
            f"the second model must have hyper-connections; got model_type {config.model_type!r} in {converted}. "
            "Give the base first and the converted checkpoint second."
        )
    added = [tensor for name, tensor in model.state_dict().items() if name not in base_model.state_dict()]
    report = report or ConversionReport(
        source=str(base),
        destination=str(converted),
        model_type=config.model_type,
        num_streams=config.hc_num_streams,
        variant=config.hc_variant,
        init=config.hc_init,
        base_tensors=len(base_model.state_dict()),
        added_parameters=sum(tensor.numel() for tensor in added),
        added_bytes=sum(tensor.nbytes for tensor in added),
    )
    difference, scale = (logits - base_logits).abs().max().item(), base_logits.abs().max().item()
    equal = torch.equal(logits, base_logits)
    close = base_model.dtype in (torch.float32, torch.float64) and difference <= LOSSLESS_FP32 * scale
    log_base, log_converted = base_logits.double().log_softmax(-1), logits.double().log_softmax(-1)
    return replace(
        report,
        dtype=str(base_model.dtype).removeprefix("torch."),
        tokens=tokens.numel(),
        text=tokenizer is not None,
        bitwise_equal=equal,
        max_logit_difference=difference,
        max_logit=scale,
        mean_kl=F.kl_div(log_converted, log_base, reduction="none", log_target=True).sum(-1).mean().item(),
        top1_agreement=(log_base.argmax(-1) == log_converted.argmax(-1)).double().mean().item(),
        greedy_base=_spell(base_greedy, tokenizer),
        greedy_converted=_spell(greedy, tokenizer),
        lossless_init=config.hc_init == "identity",
        lossless=(equal or close) and torch.equal(base_greedy, greedy),
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


def sample_tokens(
    checkpoint: str | os.PathLike[str], text: str | None, length: int, vocab_size: int
) -> tuple[Tensor, Any]:
    """The first tokens of the text and the tokenizer; random tokens and None where no tokenizer can read the sample."""
    random = torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        tokens = tokenizer(text or SAMPLE_TEXT, return_tensors="pt", truncation=True, max_length=length)["input_ids"]
    except Exception as error:  # the tokenizers library raises bare exceptions
        if text is None:
            return random, None
        raise ValueError(
            f"text needs a tokenizer that can read it; the one of {checkpoint} cannot ({error}). Leave text out."
        ) from error
    # A tokenizer of another alphabet turns the sample into a row of unknowns.
    return (tokens, tokenizer) if text or len(set(tokens[0].tolist())) > 1 else (random, None)


def _spell(tokens: Tensor, tokenizer: Any) -> str:
    ids = tokens[0].tolist()
    return tokenizer.decode(ids, skip_special_tokens=True) if tokenizer else " ".join(map(str, ids))
