"""What an inspection found as rows of text, for the terminal and for the report alike."""

from .inspection import Inspection, mean_mapping
from .statistics import STATISTICS


# Narrow enough for four streams on a terminal of 80 columns.
BRANCH_COLUMNS = ("branch", "H_pre", "H_post", *(row.column for row in STATISTICS.values() if row.column))


def layer_and_kind(branch: str) -> tuple[str, str]:
    """`layers.0.attn_hc` -> `0`, `attn`."""
    _, layer, kind = branch.rsplit(".", 2)
    return layer, kind.removesuffix("_hc")


def short_name(branch: str) -> str:
    """`layers.0.attn_hc` -> `0 attn`."""
    return " ".join(layer_and_kind(branch))


def branch_rows(inspection: Inspection) -> list[tuple[str, ...]]:
    """One row per branch, under `BRANCH_COLUMNS`.

    Read and write weights of every stream, means over the tokens, and the statistics that have a column.
    """
    rows = []
    for name, record in inspection.records.items():
        values = (
            format(inspection.statistics[f"{name}/{row.name}"], row.format) for row in STATISTICS.values() if row.column
        )
        weights = (" ".join(f"{w:.2f}" for w in mean_mapping(m).tolist()) for m in (record.h_pre, record.h_post))
        rows.append((short_name(name), *weights, *values))
    return rows


def total_rows(inspection: Inspection) -> list[tuple[str, str]]:
    """What holds for the whole model, as name and value."""
    dynamic = "depend on the token" if inspection.dynamic else "static"
    n = inspection.num_streams
    lines = sorted((row for row in STATISTICS.values() if row.line), key=lambda row: row.line)
    return [
        ("model type", inspection.model_type),
        ("hyper-connections", f"{inspection.variant}, {n} streams, {len(inspection.records)} branches, {dynamic}"),
        *([("as shown here", inspection.said)] if inspection.said else []),
        ("kernel", inspection.kernel),
        (f"{'own' if inspection.from_birth else 'added'} parameters", f"{inspection.added_parameters:,}"),
        ("tokens", f"{len(inspection.tokens):,}"),
        *((row.label, row.total.format(value=format(inspection.total[row.name], row.format), n=n)) for row in lines),
    ]
