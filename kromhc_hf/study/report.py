"""A study's results as a summary, a table and two pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .runs import Results
from .statistics import Estimate, estimate, paired_difference
from .study_file import Study
from .tuning import at_the_edge


if TYPE_CHECKING:
    from matplotlib.axes import Axes

SEPARATES, DOES_NOT = "#1f6fb2", "#9a9a9a"
LINEAR = 0.01
# Around the losses that are shown, in nats per token.
MARGIN = 0.02


def summarize(study: Study, results: Results, costs: Mapping[str, float], about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that tables and pictures are made of, as JSON; losses are held-out, in nats per token."""
    finals = {name: {seed: run["final_loss"] for seed, run in runs.items()} for name, runs in results.items()}
    arms: dict[str, Any] = {}
    for name, runs in results.items():
        other = study.compared_with(name)
        difference = None if other == name else paired_difference(finals[name], finals[other])
        some = next(iter(runs.values()))
        arms[name] = {
            "settings": some["settings"],
            "initial_loss": estimate([run["initial_loss"] for run in runs.values()]).mean,
            "final_loss": estimate(list(finals[name].values()))._asdict(),
            "bits_per_byte": estimate([run["bits_per_byte"] for run in runs.values()])._asdict(),
            "against": None if difference is None else other,
            "difference": None if difference is None else difference._asdict(),
            "separates": None if difference is None else difference.separates,
            "trainable": some["trainable"],
            "added": some["added"],
            "seconds_per_step": estimate([run["seconds_per_step"] for run in runs.values()]).mean,
            "tokens_per_second": estimate([run["tokens_per_second"] for run in runs.values()]).mean,
            "cost": costs.get(name),
            "losses": {str(seed): loss for seed, loss in finals[name].items()},
            "curve": _curve(runs, results[other]),
        }
    return {"title": study.title, "reference": study.reference, "machine": dict(about), "arms": arms}


def _curve(runs: Mapping[int, Any], others: Mapping[int, Any]) -> dict[str, list[Any]]:
    """The loss and the paired difference at every evaluation; none where the other arm was not evaluated."""
    rows: dict[str, list[Any]] = {"steps": [], "loss": [], "difference": []}
    for step in dict(next(iter(runs.values()))["curve"]):
        here, there = (
            {seed: dict(run["curve"])[step] for seed, run in arm.items() if step in dict(run["curve"])}
            for arm in (runs, others)
        )
        rows["steps"].append(step)
        rows["loss"].append(estimate(list(here.values()))._asdict())
        rows["difference"].append(paired_difference(here, there)._asdict() if len(there) == len(others) else None)
    return rows


def table(summary: Mapping[str, Any]) -> str:
    """Markdown: one row per arm."""
    rows = [_row(name, arm) for name, arm in summary["arms"].items()]
    rates = {name: _chosen_rate(arm["settings"]) for name, arm in summary["arms"].items()}
    if any(rates.values()):
        rows = [row | {"lr": rates[row["arm"]]} for row in rows]
    if summary["machine"].get("device", "cpu") != "cpu":
        for row, arm in zip(rows, summary["arms"].values()):
            row["s/step"] = row.pop("CPU s/step")
            row["tokens/s"] = f"{arm['tokens_per_second']:,.0f}"
    lines = ["| " + " | ".join(cells) + " |" for cells in (rows[0], *(row.values() for row in rows))]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    seeds = max(arm["final_loss"]["seeds"] for arm in summary["arms"].values())
    note = (
        f"Held-out loss in nats per token, mean of {seeds} seeds and standard error. Difference: paired by seed; it "
        "separates if it is larger than Student's t at 95 % times its standard error."
    )
    if any(rates.values()):
        note += " Learning rates are the best of a grid on another seed; * is at the end of its grid."
    return "\n".join([f"### {summary['title']}", "", *lines, "", note])


def _chosen_rate(settings: Mapping[str, Any]) -> str:
    """The learning rate that was chosen from a grid; empty where none was."""
    grid = settings.get("lr_grid")
    return f"{settings['lr']:g}{'*' * at_the_edge(settings['lr'], grid)}" if grid else ""


def _row(name: str, arm: Mapping[str, Any]) -> dict[str, str]:
    difference, cost, answers = arm["difference"], arm["cost"], {True: "yes", False: "no"}
    return {
        "arm": name,
        "steps": str(arm["settings"]["steps"]),
        "trained": f"{arm['trainable']:,}",
        "added": f"{arm['added']:,}",
        "held-out loss": with_error(arm["final_loss"], ""),
        "bits/byte": f"{arm['bits_per_byte']['mean']:.4f}",
        "difference": "" if difference is None else with_error(difference, "+"),
        "against": arm["against"] or "",
        # One seed alone cannot tell.
        "separates": "" if difference is None or difference["standard_error"] is None else answers[arm["separates"]],
        "CPU s/step": f"{arm['seconds_per_step']:.3f}",
        "cost": "" if cost is None else f"{cost:.2f}",
    }


def with_error(numbers: Mapping[str, Any], sign: str) -> str:
    error = numbers["standard_error"]
    return f"{numbers['mean']:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


def draw_differences(summary: Mapping[str, Any], path: Path) -> None:
    """A point per arm at its paired difference, with the 95 % interval; those that separate are coloured."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter, SymmetricalLogLocator

    arms = {name: arm for name, arm in summary["arms"].items() if arm["difference"] is not None}
    if not arms:
        return
    figure = Figure(figsize=(8, 0.32 * len(arms) + 1.4), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="#555555", linewidth=0.8)
    several = len({arm["against"] for arm in arms.values()}) > 1
    labels = []
    for row, (name, arm) in enumerate(arms.items()):
        colour = SEPARATES if arm["separates"] else DOES_NOT
        difference = Estimate(**arm["difference"])
        # A single seed has no interval.
        width = difference.half_width or 0.0
        axes.errorbar(difference.mean, row, xerr=width, fmt="o", color=colour, capsize=3, markersize=5)
        labels.append(f"{name}  (against {arm['against']})" if several else name)
    axes.set_yticks(range(len(arms)), labels)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.grid(axis="x", color="#e0e0e0", linewidth=0.6)
    axes.set_axisbelow(True)
    other = "the other arm" if several else next(iter(arms.values()))["against"]
    # Small differences and large ones in one picture: linear up to LINEAR, logarithmic beyond.
    axes.set_xscale("symlog", linthresh=LINEAR, linscale=2)
    few = max(map(abs, axes.get_xlim())) < 10 * LINEAR
    axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=LINEAR, subs=[1, 2, 5] if few else [1]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.tick_params(axis="x", labelsize=8)
    figure.supxlabel(
        f"held-out loss minus that of {other}, nats per token (logarithmic beyond {LINEAR})\n"
        "95 % interval; blue separates, left is better",
        fontsize=9,
    )
    figure.suptitle(summary["title"], fontsize=10)
    figure.savefig(path, dpi=120)


def draw_curves(summary: Mapping[str, Any], names: list[str], path: Path) -> None:
    """Over the steps: the mean held-out loss, and the mean paired difference; with bands of one standard error."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    losses, differences = panels = figure.subplots(1, 2)
    palette = colormaps["tab10" if len(names) <= 10 else "tab20"]
    for index, name in enumerate(names):
        arm, colour = summary["arms"][name], palette(index % palette.N)
        _draw_curve(losses, arm["curve"]["steps"], arm["curve"]["loss"], colour, name)
        if arm["against"] is not None:
            _draw_curve(differences, arm["curve"]["steps"], arm["curve"]["difference"], colour, name)
    losses.set_ylabel("held-out loss, nats per token")
    _leave_out_start(losses, [summary["arms"][name]["curve"]["loss"] for name in names])
    differences.set_ylabel("difference to the arm it is compared with,\nnats per token")
    differences.axhline(0, color="#555555", linewidth=0.8)
    for panel in panels:
        panel.set_xlabel("step")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(color="#e0e0e0", linewidth=0.6)
    losses.legend(fontsize=8, frameon=False)
    figure.suptitle(summary["title"], fontsize=10)
    figure.savefig(path, dpi=120)


def _leave_out_start(panel: "Axes", curves: list[list[Any]]) -> None:
    """Says in words where curves start that come from far above the rest: the interest is in the end."""
    top = max(curve[1]["mean"] for curve in curves) + MARGIN
    starts = [curve[0]["mean"] for curve in curves]
    if max(starts) > top:
        least, most = f"{min(starts):.2f}", f"{max(starts):.2f}"
        ends = (point["mean"] - (point["standard_error"] or 0.0) for curve in curves for point in curve)
        panel.set_title(f"at step 0: {least if least == most else f'{least} to {most}'}", fontsize=8)
        panel.set_ylim(min(ends) - MARGIN, top)


def _draw_curve(panel: "Axes", steps: list[int], estimates: list[Any], colour: Any, label: str) -> None:
    points = [(step, numbers) for step, numbers in zip(steps, estimates) if numbers is not None]
    means = [numbers["mean"] for _, numbers in points]
    errors = [numbers["standard_error"] or 0.0 for _, numbers in points]
    where = [step for step, _ in points]
    panel.plot(where, means, label=label, color=colour, linewidth=1.4)
    low, high = ([mean + sign * error for mean, error in zip(means, errors)] for sign in (-1, 1))
    panel.fill_between(where, low, high, color=colour, alpha=0.2, linewidth=0)
