"""What an inspection found as rows of text, for the terminal and for the report alike."""

from .inspection import Inspection, mean_mapping


# Narrow enough for four streams on a terminal of 80 columns.
BRANCH_COLUMNS = ("branch", "H_pre", "H_post", "off\nidentity", "sum\nerror", "spread")


def short_name(branch: str) -> str:
    """`layers.0.attn_hc` -> `0 attn`."""
    _, layer, kind = branch.rsplit(".", 2)
    return f"{layer} {kind.removesuffix('_hc')}"


def branch_rows(inspection: Inspection) -> list[tuple[str, ...]]:
    """One row per branch, under `BRANCH_COLUMNS`.

    Read and write weights of every stream, means over the tokens; off-identity mass as a share; doubly stochastic
    error; stream spread as a share of their size.
    """
    rows = []
    for name, record in inspection.records.items():
        mass, error, spread = (
            inspection.statistics[f"{name}/{key}"]
            for key in ("off_identity_mass", "doubly_stochastic_error", "stream_spread")
        )
        weights = (" ".join(f"{w:.2f}" for w in mean_mapping(m).tolist()) for m in (record.h_pre, record.h_post))
        rows.append((short_name(name), *weights, f"{mass:.2%}", f"{error:.1e}", f"{spread:.4f}"))
    return rows


def total_rows(inspection: Inspection) -> list[tuple[str, str]]:
    """What holds for the whole model, as name and value."""
    total = inspection.total
    dynamic = "depend on the token" if inspection.dynamic else "static"
    n = inspection.num_streams
    return [
        ("model type", inspection.model_type),
        ("hyper-connections", f"{inspection.variant}, {n} streams, {len(inspection.records)} branches, {dynamic}"),
        ("added parameters", f"{inspection.added_parameters:,}"),
        ("tokens", f"{len(inspection.tokens):,}"),
        ("composite gain, forward", f"{total['forward_gain']:.6f} (largest row sum of the product over depth)"),
        ("composite gain, backward", f"{total['backward_gain']:.6f} (largest column sum)"),
        ("doubly stochastic error", f"{total['doubly_stochastic_error']:.1e} (largest of all branches)"),
        ("off-identity mass", f"{total['off_identity_mass']:.2%} (mean over branches)"),
        ("effective number of streams", f"{total['effective_num_streams']:.3f} of {n} (mean over branches)"),
        ("cosine between streams", f"{total['stream_cosine']:.4f} (mean over branches)"),
        ("stream spread", f"{total['stream_spread']:.4f} of their size (mean over branches)"),
    ]
