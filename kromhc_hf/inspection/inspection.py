"""What the streams of a checkpoint do on a text: what the table and the report show, as numbers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..conversion.sample_text import sample_tokens
from ..conversion.stored_model import StoredModel
from ..modeling.hyper_connection import HyperConnection
from ..modeling.mixing import doubly_stochastic_error
from ..modeling.options import OPTIONS
from ..modeling.variants import make_mixing
from ..training import hyper_connection_parameters, whole_shape
from .native_streams import NATIVE_MODEL_TYPES, native_branches, native_streams
from .recording import BranchRecord, record_mappings
from .statistics import composite_products, stream_statistics


# No more variants than a picture has colours, from those with the constraint to the one without; the curves of further
# exact ones would lie on the first.
COMPARED_VARIANTS = ("kromhc", "identity", "mhc", "mhc_lite", "tbp", "hc")
# How far random logits lie around the initial ones where variants are compared: with less, Sinkhorn hides its error.
COMPARED_LOGIT_STD = 4.0
COMPARED_ENTRY_STD = 0.1  # of an unconstrained matrix, whose logits are its entries
COMPARED_DRAWS = 64
# What is said of the weights of a converted model with gates.
GATED = "H_pre is the read weights alone; the gates of every channel add their part to what is read"


@dataclass(frozen=True)
class Inspection:
    """The mappings of a model on one text, and what follows from them.

    Args:
        name: what tables and pictures call the model.
        model_type: of the model.
        variant, num_streams, dynamic: of its hyper-connections.
        kernel: what read and wrote their streams, as `repr` shows it.
        added_parameters: number of hyper-connection parameters, which a model with streams from birth has from birth.
        tokens: the text, `S` tokens as strings.
        records: mappings and streams by branch, `[1, S, ...]`.
        said: what a reader must know about the weights; empty where they are what they are called.
        from_birth: whether the family has several streams of its own.
    """

    name: str
    model_type: str
    variant: str
    num_streams: int
    dynamic: bool
    kernel: str
    added_parameters: int
    tokens: tuple[str, ...]
    records: Mapping[str, BranchRecord]
    said: str = ""
    from_birth: bool = False

    @cached_property
    def statistics(self) -> dict[str, float]:
        """See `stream_statistics`."""
        return stream_statistics(self.records)

    @cached_property
    def products(self) -> tuple[list[Tensor], list[Tensor]]:
        """See `composite_products`."""
        return composite_products([record.h_res for record in self.records.values()])

    @cached_property
    def total(self) -> dict[str, float]:
        """The statistics of the whole model."""
        return {name: value for name, value in self.statistics.items() if "/" not in name}

    def over_depth(self, name: str) -> list[float]:
        """One statistic for every branch."""
        return [self.statistics[f"{branch}/{name}"] for branch in self.records]

    @cached_property
    def sum_errors(self) -> list[float]:
        """For every branch, how far the product of `h_res` up to it is from doubly stochastic, at the worst token."""
        return [doubly_stochastic_error(product) for product in self.products[0]]

    def to_dict(self) -> dict[str, Any]:
        """Every number that the table and the report show, ready for JSON; mappings are means over the tokens."""
        forward, backward = self.products
        branches = {}
        for i, (name, record) in enumerate(self.records.items()):
            own = {key: self.statistics[f"{name}/{key}"] for key in self.total}
            own_mean = {key: mean_mapping(getattr(record, key)).tolist() for key in ("h_pre", "h_post", "h_res")}
            branches[name] = {
                **own_mean,
                **own,
                "forward_product": mean_mapping(forward[i]).tolist(),
                "backward_product": mean_mapping(backward[i]).tolist(),
                "forward_product_error": self.sum_errors[i],
                "token_variation": {
                    key: token_variation(getattr(record, key)).tolist() for key in ("h_pre", "h_post", "h_res")
                },
            }
        return {
            "name": self.name,
            "model_type": self.model_type,
            "variant": self.variant,
            "num_streams": self.num_streams,
            "dynamic": self.dynamic,
            "said": self.said,
            "kernel": self.kernel,
            "added_parameters": self.added_parameters,
            "tokens": list(self.tokens),
            "total": self.total,
            "branches": branches,
        }


def mean_mapping(mapping: Tensor) -> Tensor:
    """The mean over batch and tokens in float64, `[B, S, ...]` -> `[...]`."""
    return mapping.double().mean((0, 1))


def token_variation(mapping: Tensor) -> Tensor:
    """How much each token's mapping differs from the mean over tokens: mean absolute difference of its entries.

    Args:
        mapping: `[1, S, ...]`.

    Returns:
        `[S]`, 0 everywhere for a static mapping.
    """
    wide = mapping[0].double().flatten(1)
    # Relative to the first token, since the mean of equal numbers may round.
    relative = wide - wide[:1]
    return (relative - relative.mean(0)).abs().mean(1)


def compared_sum_errors(num_streams: int, depth: int) -> dict[str, list[float]]:
    """For `COMPARED_VARIANTS`, how far products of matrices over depth get from doubly stochastic, at the worst draw.

    The matrices are made from random logits, normal with standard deviation 4 around the initial ones (unconstrained
    `hc`: entries with 0.1 around the identity), 64 draws, seed 0, in float32. Variants that are not defined for this
    number of streams are left out.

    Args:
        num_streams: n.
        depth: number of branches.
    """
    errors = {}
    for variant in COMPARED_VARIANTS:
        try:
            mixing = make_mixing(variant, num_streams)
        except ValueError:
            continue
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(depth, COMPARED_DRAWS, mixing.num_logits, generator=generator)
        std = COMPARED_ENTRY_STD if mixing.doubly_stochastic == "no" else COMPARED_LOGIT_STD
        h_res = mixing.matrix(mixing.initial_logits(OPTIONS["residual_logit"].default) + std * noise)
        errors[variant] = [doubly_stochastic_error(product) for product in composite_products(list(h_res))[0]]
    return errors


def checkpoint_names(checkpoints: Sequence[str]) -> list[str]:
    """What checkpoints are called: Hub ids as they are, folders by as many last parts as tell them apart."""
    parts = [Path(checkpoint).resolve().parts[1:] if Path(checkpoint).exists() else None for checkpoint in checkpoints]
    folders = {own for own in parts if own}
    most = max(map(len, folders), default=1)
    kept = next(n for n in range(1, most + 1) if len({own[-n:] for own in folders}) == len(folders) or n == most)
    return ["/".join(own[-kept:]) if own else checkpoint for own, checkpoint in zip(parts, checkpoints)]


def inspect_checkpoints(
    checkpoints: Sequence[str],
    *,
    text: str | None = None,
    max_tokens: int = 128,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Inspection]:
    """Runs checkpoints with streams on the same tokens, one after the other, and records what their streams do.

    Args:
        checkpoints: folders or Hub ids, converted or of families that have several streams from birth; the tokenizer of
            the first one is used.
        text: what to run them on; by default a short story, or random tokens where there is no tokenizer.
        max_tokens: take at most so many tokens, and never more than the context of the models.
        trust_remote_code: whether code in their folders may be run, for families whose code is not in transformers.
        progress: called with the steps done and their number.

    Raises:
        ValueError: if a checkpoint is incomplete, an adapter, or has no hyper-connections or a single stream, the text
            is empty, or the checkpoints have different vocabularies or branches.
        OSError: if one of them cannot be loaded.
    """
    given: dict[str, Any] = {"trust_remote_code": trust_remote_code, "also": NATIVE_MODEL_TYPES}
    opened_all = (StoredModel.open(checkpoint, **given) for checkpoint in checkpoints)
    stored = [opened if native_streams(opened.config) else opened.with_streams() for opened in opened_all]
    configs = [model.config for model in stored]
    for checkpoint, config in zip(checkpoints, configs):
        _check_num_streams(_facts(config)["num_streams"], checkpoint)
    vocabularies = [config.get_text_config().vocab_size for config in configs]
    if len(set(vocabularies)) > 1:
        raise ValueError(
            f"checkpoints to compare must have one vocabulary; got sizes {', '.join(map(str, vocabularies))}. "
            "Compare two stages of one model."
        )
    contexts = [getattr(c.get_text_config(), "max_position_embeddings", None) or max_tokens for c in configs]
    ids, tokenizer = sample_tokens(stored[0].folder, text, min(max_tokens, *contexts), vocabularies[0])
    tokens = tuple(tokenizer.decode([i]) if tokenizer else str(i) for i in ids[0].tolist())
    inspections: list[Inspection] = []
    for position, (opened, name) in enumerate(zip(stored, checkpoint_names(checkpoints))):
        _report(progress, 2 * position, 2 * len(checkpoints))
        model = opened.load()
        _report(progress, 2 * position + 1, 2 * len(checkpoints))
        inspections.append(inspect_model(model.eval(), ids, tokens, name=name))
        del model
    _report(progress, 2 * len(checkpoints), 2 * len(checkpoints))
    first, *others = [tuple(inspection.records) for inspection in inspections]
    for other in others:
        if other != first:
            raise ValueError(
                f"checkpoints to compare must have the same branches; got {len(first)} ({first[0]}, ...) and "
                f"{len(other)} ({other[0]}, ...). Compare two stages of one model."
            )
    return inspections


def inspect_model(model: Any, input_ids: Tensor, tokens: Sequence[str] | None = None, *, name: str = "") -> Inspection:
    """Runs a model with several streams on one sequence and records what its streams do.

    Args:
        model: the model, on any device; converted, or of a family that has several streams from birth.
        input_ids: `[1, S]`.
        tokens: what the tokens are called, by default their ids.
        name: what to call the model, by default its class.

    Raises:
        ValueError: if the model has no hyper-connections or a single stream, or `input_ids` is not one sequence.
    """
    if input_ids.dim() != 2 or len(input_ids) != 1:
        raise ValueError(f"input_ids must be one sequence, [1, S]; got {tuple(input_ids.shape)}. Use input_ids[:1].")
    with record_mappings(model, input_ids.to(model.device)) as records:
        facts = _facts(model.config)
        _check_num_streams(facts["num_streams"], name or type(model).__name__)
    modules = [module for module, _ in native_branches(model).values()]
    kernels = {m.described_kernel() for m in model.modules() if isinstance(m, HyperConnection)}
    parameters = [p for module in modules for p in module.parameters()] or hyper_connection_parameters(model)
    return Inspection(
        name=name or type(model).__name__,
        model_type=model.config.model_type,
        **facts,
        kernel=", ".join(sorted(kernels)) or "the family's own modules",
        added_parameters=sum(whole_shape(p).numel() for p in parameters),
        tokens=tuple(map(str, input_ids[0].tolist())) if tokens is None else tuple(tokens),
        records={branch: BranchRecord(*(part.cpu() for part in record)) for branch, record in records.items()},
    )


def _facts(config: Any) -> dict[str, Any]:
    """What a configuration says about streams, converted or from birth."""
    native = native_streams(config)
    if native is None:
        said = GATED if getattr(config, "hc_read", "weights") == "gated" else ""
        facts = {"variant": config.hc_variant, "num_streams": config.hc_num_streams, "dynamic": config.hc_dynamic}
        return {**facts, "said": said}
    num_streams = getattr(config.get_text_config(), native.num_streams)
    return {
        "variant": native.variant,
        "num_streams": num_streams,
        "dynamic": True,
        "said": native.said,
        "from_birth": True,
    }


def _check_num_streams(num_streams: int, name: str) -> None:
    if num_streams < 2:
        raise ValueError(
            f"a model must have at least 2 streams to look at; got {num_streams} in {name}. "
            "Convert its base with --num-streams 4."
        )


def _report(progress: Callable[[int, int], None] | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)
