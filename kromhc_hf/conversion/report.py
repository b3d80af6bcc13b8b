"""What a conversion did, and what its verification found."""

from dataclasses import asdict, dataclass
from typing import Any

from ..modeling.outside_families import has_derived_row
from ..modeling.stream_layers import in_words


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
        stream_layers: positions of the first layer with hyper-connections and of the one behind the last; None for all.
        derived: whether what its layers look like was read from their source, see `derive_family`.
        dtype: in which both models ran.
        tokens: number of tokens compared.
        text: whether they were real text (a tokenizer was there) or random.
        image: what a model of several modalities was given beside them; None for a model that takes text alone.
        output: what was compared: "logits", "start and end logits" or "last hidden state", as the head of the base is.
        bitwise_equal: whether all of that are the same bits.
        max_logit_difference: largest |difference|.
        max_logit: largest |value| of the base, the scale of the difference.
        mean_kl: mean over tokens of KL(base || converted), nats. This and the next three are of models that continue a
            text, and None for other heads.
        top1_agreement: share of tokens with the same most likely next token.
        greedy_base, greedy_converted: greedy continuation of both, text or token ids.
        lossless_init: whether the init promises an unchanged function.
        lossless: bitwise equal, or in fp32 within 2e-6 of the largest logit, and the same greedy continuation.
        layers: positions of the layers that were compared one by one; None where the whole models ran. There is no
            greedy continuation then.
        first_different_layer: the first of them whose output differs by more than lossless allows; None if there is
            none.
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
    stream_layers: tuple[int, int] | None = None
    derived: bool = False
    dtype: str | None = None
    tokens: int | None = None
    text: bool | None = None
    image: str | None = None
    output: str | None = None
    bitwise_equal: bool | None = None
    max_logit_difference: float | None = None
    max_logit: float | None = None
    mean_kl: float | None = None
    top1_agreement: float | None = None
    greedy_base: str | None = None
    greedy_converted: str | None = None
    lossless_init: bool | None = None
    lossless: bool | None = None
    layers: tuple[int, ...] | None = None
    first_different_layer: int | None = None

    @classmethod
    def of(
        cls, source: Any, destination: Any, config: Any, base_tensors: int, added_parameters: int, added_bytes: int
    ) -> "ConversionReport":
        """What is known of a converted model, by its configuration, before anything has run."""
        options = config.stream_options()
        return cls(
            source=str(source),
            destination=str(destination),
            model_type=config.model_type,
            num_streams=options.num_streams,
            variant=options.variant,
            init=options.init,
            base_tensors=base_tensors,
            added_parameters=added_parameters,
            added_bytes=added_bytes,
            stream_layers=options.layers,
            derived=has_derived_row(config),
        )

    @property
    def passed(self) -> bool:
        """False only where an init that promises an unchanged function did not keep it."""
        return not (self.lossless_init and self.lossless is False)

    def to_dict(self) -> dict[str, Any]:
        """All fields and `passed`, ready for JSON."""
        return {**asdict(self), "passed": self.passed}


def report_rows(report: ConversionReport) -> list[tuple[str, Any]]:
    """What a report says, as name and value, for the terminal."""
    where = "" if report.stream_layers is None else f", in layers {in_words(report.stream_layers)}"
    rows: list[tuple[str, Any]] = [
        ("model type", f"{report.model_type}, layers by a derived row" if report.derived else report.model_type),
        ("hyper-connections", f"{report.variant}, {report.num_streams} streams, init {report.init}{where}"),
        ("base tensors, unchanged", f"{report.base_tensors:,}"),
        ("added parameters", f"{report.added_parameters:,} ({report.added_bytes:,} bytes)"),
    ]
    if report.lossless is None:
        return rows
    image = f" with {report.image}" if report.image else ""
    verdict = "bitwise equal" if report.bitwise_equal else f"max |difference| {report.max_logit_difference:.3g}"
    return [
        *rows,
        ("compared on", f"{report.tokens} {'text' if report.text else 'random'} tokens{image} in {report.dtype}"),
        (report.output or "logits", f"{verdict} (largest |value| {report.max_logit:.3g})"),
        *_distribution(report),
        *_continuation_or_layers(report),
        ("lossless", {True: "yes", False: "NO"}[bool(report.lossless)]),
    ]


def _distribution(report: ConversionReport) -> list[tuple[str, Any]]:
    if report.mean_kl is None:
        return []
    return [("mean KL", f"{report.mean_kl:.3g} nats"), ("top-1 agreement", f"{report.top1_agreement:.2%}")]


def _continuation_or_layers(report: ConversionReport) -> list[tuple[str, Any]]:
    if report.layers is None and report.greedy_base is None:
        return []
    if report.layers is None:
        return [("greedy, base", report.greedy_base), ("greedy, converted", report.greedy_converted)]
    first = report.first_different_layer
    verdict = "all equal" if first is None else f"layer {first} is the first that differs"
    return [("compared one by one", f"{len(report.layers)} layers: {verdict}")]
