"""Which pictures the report shows, in which order, and what is said about them."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .inspection import Inspection, compared_sum_errors, mean_mapping, token_variation
from .page import Picture, Section
from .plots import DIVERGING, SEQUENTIAL, curves_figure, depth_map_figure, matrix_figure, scale_figure, token_map_figure
from .small_multiples import branch_pictures, odd_ones_out, said_of_odd_ones
from .statistics import STATISTICS, composite_gain
from .tables import short_name


SHOWN_PRODUCTS = 4
TOKENS = (
    "Dynamic mappings depend on the token. Bright cells are tokens at which a branch reads, writes or mixes unlike "
    "its own average. Each picture has a scale of its own."
)
READING = (
    "A branch reads the sum of the streams with weights H_pre, and its output is added to every stream with weight "
    "H_post. A plain residual connection reads with weights that sum to 1 and writes with 1."
)
MIXING = (
    "Each square is the mixing matrix of one residual branch. Row i says where stream i comes from: the weight of "
    "every stream j in it. A bright diagonal means that the streams keep to themselves; off-identity mass is the "
    "share of a stream that comes from the others."
)


def sections(inspection: Inspection, before: Inspection | None = None) -> list[Section]:
    """The sections of the report; nothing is drawn yet."""
    parts = [_mixing(inspection, "after" if before else "", before)]
    if before is not None:
        parts.append(_mixing(before, "before"))
        if before.num_streams == inspection.num_streams:
            parts.append(_change(inspection, before))
    parts.append(_reading_and_writing(inspection, "after" if before else ""))
    if before is not None:
        parts.append(_reading_and_writing(before, "before"))
    parts += [_products(inspection, before), _sum_errors(inspection, before), _similarity(inspection, before)]
    parts.append(_tokens(inspection, "after" if before else ""))
    if before is not None:
        parts.append(_tokens(before, "before"))
    return parts


def _titled(title: str, which: str) -> str:
    return f"{title}, {which}" if which else title


def weight_limits(matrices: Sequence[Tensor]) -> tuple[tuple[float, float], str]:
    """Limits and colours for weights: 0 to 1 where that is enough, else symmetric about 0."""
    low, high = min(m.min().item() for m in matrices), max(m.max().item() for m in matrices)
    # Rounding may go beyond by some ulps.
    if low > -1e-4 and high < 1 + 1e-4:
        return (0.0, 1.0), SEQUENTIAL
    bound = max(1.0, -low, high)
    return (-bound, bound), DIVERGING


def _scale(limits: tuple[float, float], colours: str) -> Picture:
    label = "weight (no unit), mean over tokens"
    return Picture("scale", f"colour scale: {label}", partial(scale_figure, label, limits, colours))


def _mixing(inspection: Inspection, which: str, before: Inspection | None = None) -> Section:
    names = list(inspection.records)
    means = [mean_mapping(record.h_res) for record in inspection.records.values()]
    limits, colours = weight_limits(means)
    odd = odd_ones_out(dict(zip(names, means)))
    shown = branch_pictures("mean H_res", dict(zip(names, means)), limits, colours, odd)
    pictures = [_scale(limits, colours), *shown]
    if which != "before":
        pictures.append(_curves("off-identity mass", ["off_identity_mass"], inspection, before))
    return Section(
        _titled("How the streams mix: H_res", which),
        " ".join(["" if which == "before" else MIXING, said_of_odd_ones(odd)]).strip(),
        pictures,
    )


def _change(inspection: Inspection, before: Inspection) -> Section:
    pairs = zip(inspection.records.values(), before.records.values())
    changes = [mean_mapping(record.h_res) - mean_mapping(old.h_res) for record, old in pairs]
    bound = max(0.01, *(change.abs().max().item() for change in changes))
    limits, by_branch = (-bound, bound), dict(zip(inspection.records, changes))
    odd = odd_ones_out(by_branch)
    shown = branch_pictures("change of mean H_res", by_branch, limits, DIVERGING, odd)
    return Section(
        "How the mixing has changed: after minus before",
        f"Violet: a stream takes more from another than before; orange: it takes less. {said_of_odd_ones(odd)}".strip(),
        [_scale(limits, DIVERGING), *shown],
    )


def _reading_and_writing(inspection: Inspection, which: str) -> Section:
    names = list(inspection.records)
    pictures = []
    # Many streams are read with small weights, which a scale up to 1 would not tell from 0.
    for key, symbol, top in (("h_pre", "H_pre", min(1.0, 4 / inspection.num_streams)), ("h_post", "H_post", 2.0)):
        values = torch.stack([mean_mapping(getattr(record, key)) for record in inspection.records.values()])
        limits = (min(0.0, values.min().item()), max(top, values.max().item()))
        label = f"{symbol}: weight (no unit), mean over tokens"
        draw = partial(depth_map_figure, values, names, label, limits)
        pictures.append(Picture("large", f"{symbol} over depth", draw))
    return Section(
        _titled("What branches read and write: H_pre and H_post", which),
        "" if which == "before" else READING,
        pictures,
    )


def _products(inspection: Inspection, before: Inspection | None) -> Section:
    names = list(inspection.records)
    forward, backward = inspection.products
    last = len(names) - 1
    shown = sorted({round(last * i / SHOWN_PRODUCTS) for i in range(SHOWN_PRODUCTS + 1)})
    forwards, backwards = shown[1:] or [0], shown[:-1] or [0]
    ends = [f"{short_name(names[0])} to {short_name(names[i])}" for i in forwards]
    starts = [f"{short_name(names[i])} to {short_name(names[-1])}" for i in backwards]
    titles = [
        *(f"{end}\nforward gain {inspection.over_depth('forward_gain')[i]:.4f}" for end, i in zip(ends, forwards)),
        *(
            f"{start}\nbackward gain {inspection.over_depth('backward_gain')[i]:.4f}"
            for start, i in zip(starts, backwards)
        ),
    ]
    matrices = [mean_mapping(forward[i]) for i in forwards] + [mean_mapping(backward[i]) for i in backwards]
    limits, colours = weight_limits(matrices)
    pictures = [_scale(limits, colours)]
    for title, matrix in zip(titles, matrices):
        draw = partial(matrix_figure, matrix, title, limits, colours)
        pictures.append(Picture("small", f"product of H_res, {title}", draw))
    gains = [STATISTICS["forward_gain"], STATISTICS["backward_gain"]]
    own = [(gain.curve, inspection.over_depth(gain.name)) for gain in gains]
    # Of a single matrix, forward and backward gain are its largest row and column sum.
    single = [composite_gain([record.h_res]) for record in inspection.records.values()]
    own += [("single, forward", [f.item() for f, _ in single]), ("single, backward", [b.item() for _, b in single])]
    old = [] if before is None else [(gain.curve, before.over_depth(gain.name)) for gain in gains]
    top = max(max(values) for _, values in [*own, *old])
    floor = 1e-2 if top > 20 else None
    axis, span = f"gain ({gains[0].unit})", gains[0].span
    curves = partial(curves_figure, own, names, axis, earlier=old, floor=floor, span=span)
    pictures.append(Picture("large", "gain over depth", curves))
    return Section(
        "What all mixing together does: the product over depth",
        "A signal passes through the product of all mixing matrices before it, and a gradient through the transpose of "
        "the product of all after it. Forward gain is the largest absolute row sum of a product, backward gain the "
        "largest absolute column sum, at the worst token: with doubly stochastic matrices both are 1 at any depth, "
        "without the constraint they grow.",
        pictures,
    )


def _sum_errors(inspection: Inspection, before: Inspection | None) -> Section:
    names = list(inspection.records)
    compared = compared_sum_errors(inspection.num_streams, len(names))
    curves = [("this model", inspection.sum_errors)]
    curves += [(f"{variant}, random", errors) for variant, errors in compared.items() if variant != "identity"]
    old = [] if before is None else [("this model", before.sum_errors)]
    label = "|sum - 1| (no unit, log scale)"
    draw = partial(curves_figure, curves, names, label, earlier=old, floor=1e-8)
    return Section(
        "Are row and column sums kept? By variant",
        "How far the row and column sums of the product over depth are from 1, the largest one at the worst token: for "
        "this model, and, as a yardstick that has nothing to do with its weights, for random matrices of other "
        "variants, where they exist for this number of streams (logits with standard deviation 4, of hc entries with "
        "0.1 around the identity, 64 draws). Sinkhorn iterations (mhc) leave an error, the others round in float32.",
        [Picture("large", "row and column sum error over depth by variant", draw)],
    )


def _similarity(inspection: Inspection, before: Inspection | None) -> Section:
    n = inspection.num_streams
    return Section(
        "How alike the streams are",
        "Cosine is the mean over pairs of streams: 1 for equal streams. Spread is their distance from their mean over "
        f"their size: 0 for equal streams. The effective number of streams goes from 1 (all alike) to {n} (nothing in "
        "common). All are measured where the branch reads.",
        [
            _curves("stream similarity over depth", ["stream_cosine", "stream_spread"], inspection, before),
            _curves("effective number of streams over depth", ["effective_num_streams"], inspection, before),
        ],
    )


def _curves(label: str, keys: Sequence[str], inspection: Inspection, before: Inspection | None) -> Picture:
    """Statistics of one unit over depth, in one picture."""
    rows = [STATISTICS[key] for key in keys]

    def curves(source: Inspection | None) -> list[tuple[str, list[float]]]:
        name = "after" if len(rows) == 1 else None
        return [] if source is None else [(name or row.curve, source.over_depth(row.name)) for row in rows]

    own, old = curves(inspection), curves(before)
    names = list(inspection.records)
    axis, span = f"{' and '.join(row.curve for row in rows)} ({rows[0].unit})", max(row.span for row in rows)
    return Picture("large", label, partial(curves_figure, own, names, axis, earlier=old, span=span))


def _tokens(inspection: Inspection, which: str) -> Section:
    title = _titled("Token by token", which)
    variations = {
        symbol: torch.stack([token_variation(getattr(record, key)) for record in inspection.records.values()])
        for symbol, key in (("H_pre", "h_pre"), ("H_post", "h_post"), ("H_res", "h_res"))
    }
    if not any(variation.any() for variation in variations.values()):
        reason = (
            "so they are the same for every token." if not inspection.dynamic else "and equal for all these tokens."
        )
        kind = "dynamic" if inspection.dynamic else "static"
        return Section(title, f"The mappings of this model are {kind}, {reason}", [])
    names = list(inspection.records)
    pictures = []
    for symbol, variation in variations.items():
        if variation.any():
            draw = partial(token_map_figure, variation, names, inspection.tokens, "|weight - mean| (no unit)")
            label = f"{symbol}: mean difference of a token's weights from the mean over tokens"
            pictures.append(Picture("scroll", label, draw))
    return Section(
        title,
        "" if which == "before" else TOKENS,
        pictures,
    )
