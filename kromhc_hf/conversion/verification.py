"""Proof that a converted checkpoint computes what its base computes."""

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modeling.modeling_kromhc import GENERATIVE_FACES
from ..training import hyper_connection_state_dict
from .comparable import checked_pair, comparable_dtype
from .layerwise import LayerwiseModel
from .report import ConversionReport
from .sample_image import Example, image_example
from .sample_text import SAMPLE_TEXT, sample_tokens
from .stored_model import OUTPUT_NAMES, StoredModel, head_output


# In fp32 sums of the same terms in another order differ in the last bits; in half precision nothing may differ.
LOSSLESS_FP32 = 2e-6
# Token by token a CPU is several times faster in fp32. Models with more parameters stay as they are, for their memory.
MOST_WIDENED = 2**30


@torch.no_grad()
def verify_conversion(
    base: str | os.PathLike[str],
    converted: str | os.PathLike[str],
    *,
    text: str | None = None,
    max_tokens: int = 256,
    new_tokens: int = 8,
    dtype: torch.dtype | str = "auto",
    layers: str | Sequence[int] | None = None,
    revision: str | None = None,
    subfolder: str = "",
    weight_variant: str | None = None,
    trust_remote_code: bool = False,
    report: ConversionReport | None = None,
    part: Callable[[str], None] = lambda name: None,
) -> ConversionReport:
    """Runs a base model and its converted form on the same tokens and compares what their heads compute.

    With `layers`, the models are run one decoder layer at a time, which takes the memory of the embeddings, one layer
    and the head, and the output of every layer is compared too. Models of several modalities are given an image beside
    the text, through their processor if they have one, or random pixels or sound.

    Args:
        base: folder or Hub id of the base checkpoint.
        converted: folder or Hub id of the converted one.
        text: what to run them on; by default a short story. Without a tokenizer, random tokens are used.
        max_tokens: at most so many tokens, and never more than the model's context.
        new_tokens: length of the greedy continuation with a cache. On a CPU, models in half precision with up to 2**30
            parameters continue in fp32.
        dtype: to load both in; "auto" is the one they are stored in, or fp32 for families whose layers add their
            branches in an order that hyper-connections do not have: in half precision equal functions differ there.
        layers: "all" to compare layer by layer, or the positions of some layers, such as `range(8, 12)`, which are then
            run on the embeddings as if there were no others. None runs the whole models in memory.
        revision: of the base, if it is on the Hub; by default the one that the converted checkpoint was made from.
        subfolder: where the base is in its folder or repository.
        weight_variant: which set of weights of the base, what transformers calls `variant`.
        trust_remote_code: whether code in the two folders may be run, for a family whose code is not in transformers.
        report: a report to complete, as the conversion wrote it.
        part: called with a few words as each part of the work begins.

    Raises:
        ValueError: if one of the two is incomplete, `converted` cannot have been made from `base` or has no
            hyper-connections, the text is empty, there are no such layers, the family cannot be compared in this
            dtype, or one is quantised by a method that does not run here, or not by layers.
        OSError: if one of the two cannot be loaded.
    """
    # The converted one first, which may bring the row of its family along.
    second = StoredModel.open(converted, trust_remote_code=trust_remote_code)
    origin = getattr(second.config, "hc_conversion", None) or {}
    if revision is None and origin.get("base_model") == str(base) and not Path(base).exists():
        revision = origin.get("base_revision")
    named: dict[str, Any] = {"revision": revision, "subfolder": subfolder, "weight_variant": weight_variant}
    first = StoredModel.open(base, **named, trust_remote_code=trust_remote_code)
    text_config = first.config.get_text_config()
    wanted = None if layers is None else _positions(layers, text_config.num_hidden_layers)
    skeleton = checked_pair(first, second)
    dtype = comparable_dtype(dtype, skeleton)
    context = getattr(text_config, "max_position_embeddings", None) or max_tokens
    # Images and the continuation need room too.
    length = min(max_tokens, context if text_config is first.config else context // 2)
    tokens, tokenizer = sample_tokens(first.folder, text, length, text_config.vocab_size)

    def example_for(model: Any, run: Callable[..., Any] | None = None) -> Example:
        found = image_example(model, first.folder, tokens, text or SAMPLE_TEXT, run)
        return found or Example({"input_ids": tokens}, None)

    report = replace(report or _report(first, second, skeleton), text=tokenizer is not None)
    if wanted is not None:
        part("both models, layer by layer")
        return _verify_layers(first, second, example_for, wanted, dtype, report)
    gc.collect()
    part("loading the base")
    model = first.load(dtype)
    example = example_for(model)
    of_base = _run(model, first, example, new_tokens, "the base", part)
    del model
    gc.collect()
    part("loading the converted model")
    of_converted = _run(second.load(dtype), second, example, new_tokens, "the converted model", part)
    part("comparing")
    return replace(
        _compared(report, example, of_base.output, of_converted.output, first),
        output=OUTPUT_NAMES.get(first.face, "logits"),
        dtype=str(of_base.dtype).removeprefix("torch."),
        greedy_base=_spell(of_base.continuation, tokenizer),
        greedy_converted=_spell(of_converted.continuation, tokenizer),
        lossless=_close(of_converted.output, of_base.output, of_base.dtype)
        and of_converted.continuation == of_base.continuation,
    )


def _verify_layers(
    base: StoredModel,
    converted: StoredModel,
    example_for: Callable[..., Example],
    layers: list[int],
    dtype: torch.dtype | str,
    report: ConversionReport,
) -> ConversionReport:
    """`verify_conversion` with one layer of one model in memory at a time."""
    model = LayerwiseModel(base, dtype)
    example = example_for(model.model, partial(model.run, layers=()))
    output, states = model.run(layers=layers, **example.inputs)
    other_output, other_states = LayerwiseModel(converted, model.dtype).run(layers=layers, **example.inputs)
    pairs = zip(layers, other_states, states)
    different = (position for position, state, expected in pairs if not _close(state, expected, model.dtype))
    first = next(different, None)
    return replace(
        _compared(report, example, output, other_output, base),
        output=OUTPUT_NAMES.get(base.face, "logits"),
        dtype=str(model.dtype).removeprefix("torch."),
        lossless=first is None and _close(other_output, output, model.dtype),
        layers=tuple(layers),
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


def _report(base: StoredModel, converted: StoredModel, skeleton: Any) -> ConversionReport:
    """A report of what is known without running the models."""
    added = hyper_connection_state_dict(skeleton).values()
    return ConversionReport.of(
        base.name,
        converted.name,
        converted.config,
        base_tensors=len(base.tensors().names),
        added_parameters=sum(tensor.numel() for tensor in added),
        added_bytes=sum(tensor.nbytes for tensor in added),
    )


def _compared(
    report: ConversionReport, example: Example, base: Tensor, converted: Tensor, stored: StoredModel
) -> ConversionReport:
    """The report with the numbers of two outputs."""
    if base.isnan().any():
        raise ValueError(
            f"the outputs of the base must be numbers to compare with; those of {stored.name} have nan among them. "
            "Verify in another dtype (--dtype float32), or fetch its files again."
        )
    report = replace(
        report,
        tokens=example.inputs["input_ids"].numel(),
        image=example.kind,
        bitwise_equal=torch.equal(converted, base),
        max_logit_difference=(converted - base).abs().max().item(),
        max_logit=base.abs().max().item(),
        lossless_init=report.init == "identity",
    )
    if stored.face not in GENERATIVE_FACES:
        return report
    log_base, log_converted = base.double().log_softmax(-1), converted.double().log_softmax(-1)
    return replace(
        report,
        mean_kl=F.kl_div(log_converted, log_base, reduction="none", log_target=True).sum(-1).mean().item(),
        top1_agreement=(log_base.argmax(-1) == log_converted.argmax(-1)).double().mean().item(),
    )


class _Outcome(NamedTuple):
    """What a model computed: its output in fp32, its dtype, and its greedy continuation if it has one."""

    output: Tensor
    dtype: torch.dtype
    greedy: Tensor | None

    @property
    def continuation(self) -> list[int]:
        return [] if self.greedy is None else self.greedy[0].tolist()


def _run(
    model: Any, stored: StoredModel, example: Example, new_tokens: int, name: str, part: Callable[[str], None]
) -> _Outcome:
    inputs, dtype = example.inputs, model.dtype
    part(f"running {name}")
    output = head_output(model(**inputs))
    greedy = None
    if stored.face in GENERATIVE_FACES:
        length = inputs["input_ids"].shape[1]
        prompt = inputs
        if example.kind is None:
            ids = inputs["input_ids"][:, : max(1, min(length // 2, 16))]
            prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        text_config = model.config.get_text_config()
        present = prompt["input_ids"].shape[1]
        room = (getattr(text_config, "max_position_embeddings", None) or length + new_tokens) - present
        if room > 0:
            part(f"text from {name}")
            prompt = _widened(model, prompt)
            # A configuration from outside may have none.
            padding = getattr(text_config, "pad_token_id", None) or 0
            options = {"max_new_tokens": min(new_tokens, room), "pad_token_id": padding}
            greedy = model.generate(**prompt, do_sample=False, **options)
    return _Outcome(output.float(), dtype, greedy)


def _widened(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs in fp32, and the model in place, where text comes faster that way; else as they are."""
    plain = getattr(model, "hf_quantizer", None) is None and model.dtype in (torch.bfloat16, torch.float16)
    if model.device.type != "cpu" or not plain or model.num_parameters() > MOST_WIDENED:
        return inputs
    model.float()
    floats = (key for key, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point())
    return inputs | {key: inputs[key].float() for key in floats}


def _spell(ids: list[int], tokenizer: Any) -> str | None:
    if not ids:
        return None
    return tokenizer.decode(ids, skip_special_tokens=True) if tokenizer else " ".join(map(str, ids))
