"""Draws the figures of the documentation and prints their numbers: `python scripts/draw_figures.py`."""

from pathlib import Path
from typing import Any

import torch

from kromhc_hf import HyperConnection
from kromhc_hf.inspection.inspection import COMPARED_VARIANTS, compared_sum_errors
from kromhc_hf.inspection.plots import WIDTH, curves_figure, draw_matrix, new_figure, style
from kromhc_hf.inspection.themed_svg import INK, SERIES, to_svg
from kromhc_hf.modeling.variants import make_mixing
from kromhc_hf.parameter_counts import count_parameters


FOLDER = Path(__file__).resolve().parents[1] / "docs" / "figures"
BRANCHES = [f"layers.{layer}.{kind}" for layer in range(12) for kind in ("attn_hc", "ffn_hc")]
HIDDEN_SIZE = 768
STREAMS = (2, 4, 8, 16)


def streams() -> Any:
    """Two residual branches around four streams: what is read, what is written, and what is mixed."""
    figure = new_figure(1.7 * WIDTH, 2.2)
    panel = figure.subplots()
    levels, ends = range(4), [0.0, 2.2, 3.4, 7.0, 8.2, 9.6]
    for level, colour in zip(levels, SERIES):
        for start, end in zip(ends[::2], ends[1::2]):
            panel.plot([start, end], [level, level], color=colour, linewidth=2)
    for left, name in ((2.2, "attention"), (7.0, "feed-forward")):
        mixed = {"boxstyle": "round,pad=0.1", "facecolor": "none", "edgecolor": INK, "linewidth": 0.8}
        panel.add_patch(_box(left, -0.35, 1.2, 3.7, mixed))
        panel.text(left + 0.6, 1.5, "H_res", ha="center", va="center", fontsize=9, color=INK)
        panel.add_patch(_box(left - 0.25, 4.35, 1.7, 0.75, mixed))
        panel.text(left + 0.6, 4.72, name, ha="center", va="center", fontsize=9, color=INK)
        arrow = {"arrowstyle": "->", "color": INK, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}
        panel.annotate("", (left - 0.05, 4.3), (left - 0.6, 3.05), arrowprops=arrow)
        panel.annotate("", (left + 1.8, 3.05), (left + 1.25, 4.3), arrowprops=arrow)
        panel.text(left - 0.75, 3.75, "H_pre", ha="right", va="center", fontsize=9, color=INK)
        panel.text(left + 1.75, 3.75, "H_post", ha="left", va="center", fontsize=9, color=INK)
    panel.text(-0.15, 1.5, "n streams", ha="right", va="center", fontsize=9, color=INK)
    panel.set_xlim(-1.5, 10.2)
    panel.set_ylim(-0.6, 5.3)
    panel.axis("off")
    return figure


def _box(x: float, y: float, width: float, height: float, look: dict[str, Any]) -> Any:
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch((x, y), width, height, **look)


def factors() -> Any:
    """Two 2 x 2 factors and their Kronecker product."""
    shares = (0.9, 0.7)
    parts = [torch.tensor([[share, 1 - share], [1 - share, share]]) for share in shares]
    product = make_mixing("kromhc", 4).matrix(torch.tensor([-torch.logit(torch.tensor(share)) for share in shares]))
    torch.testing.assert_close(product, torch.kron(*parts))
    print(f"factors: sums of rows {product.sum(1).tolist()}, of columns {product.sum(0).tolist()}")
    figure = new_figure(1.2 * WIDTH, 1.9)
    for panel, matrix, title in zip(figure.subplots(1, 3), [*parts, product], ["U_1", "U_2", "H_res = U_1 ⊗ U_2"]):
        draw_matrix(panel, matrix, title)
        panel.set_xlabel("from", color=INK)
        panel.set_ylabel("to", color=INK)
    return figure


def sum_errors() -> Any:
    """How far products of random matrices over 24 branches get from doubly stochastic, by variant."""
    errors = {variant: values for variant, values in compared_sum_errors(4, 24).items() if variant != "identity"}
    for variant, values in errors.items():
        print(f"sum error after 24 branches, {variant}: {values[-1]:.1e}")
    label = "|sum - 1| (no unit, log scale)"
    return curves_figure(list(errors.items()), BRANCHES, label, floor=1e-8)


def parameters() -> Any:
    """Added parameters of 24 branches at a hidden size of 768, by variant and number of streams."""
    figure = new_figure(WIDTH, 3.0)
    panel = figure.subplots()
    for i, variant in enumerate(name for name in COMPARED_VARIANTS if name != "identity"):
        counts = {}
        for n in STREAMS:
            try:
                counts[n] = count_parameters(HIDDEN_SIZE, n, variant, num_branches=24)
            except ValueError:
                continue  # not defined for so many streams
        print(f"added parameters, {variant}: {', '.join(f'n={n} {count:,}' for n, count in counts.items())}")
        panel.plot(counts.keys(), counts.values(), color=SERIES[i], marker="osD^vX"[i], markersize=4, label=variant)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(STREAMS, list(map(str, STREAMS)))
    panel.set_xlabel("number of streams n", fontsize=9)
    panel.set_ylabel("added parameters (count, log scale)", fontsize=9)
    style(panel)
    figure.legend(loc="outside upper left", ncols=3, fontsize=8.5, frameon=False, labelcolor=INK)
    return figure


def mixing_gradient() -> Any:
    """How strongly mixing can learn, by the residual logit that it starts with."""
    logits = [float(logit) for logit in range(9)]
    gradients, masses = [], []
    for logit in logits:
        connection = HyperConnection(8, 2, residual_logit=logit)
        bias = connection.mixing.initial_logits(logit).requires_grad_()
        swap = connection.mixing.matrix(bias)[0, 1]
        (gradient,) = torch.autograd.grad(swap, bias)
        gradients.append(gradient.item())
        masses.append(swap.item())
    for logit, gradient, mass in zip(logits, gradients, masses):
        print(
            f"residual logit {logit:g}: off-identity mass {mass:.4f}, gradient {gradient / gradients[0]:.4f} of largest"
        )
    figure = new_figure(WIDTH, 2.6)
    panel = figure.subplots()
    relative = [gradient / gradients[0] for gradient in gradients]
    panel.plot(logits, relative, color=SERIES[0], marker="o", markersize=4, label="gradient, share of the largest")
    panel.plot(logits, masses, color=SERIES[1], marker="s", markersize=4, label="off-identity mass, share")
    panel.set_xlabel("residual_logit (no unit)", fontsize=9)
    panel.set_ylabel("share (log scale)", fontsize=9)
    panel.set_yscale("log")
    style(panel)
    figure.legend(loc="outside upper left", ncols=1, fontsize=8.5, frameon=False, labelcolor=INK)
    return figure


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for draw in (streams, factors, sum_errors, parameters, mixing_gradient):
        name = draw.__name__.replace("_", "-")
        svg = to_svg(draw(), name, (draw.__doc__ or "").strip(), standalone=True)
        (FOLDER / f"{name}.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
