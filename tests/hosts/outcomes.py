"""What is checked of every family on every release, what came out, and the table of it."""

import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


# In the order of the columns.
CHECKS = {
    "logits": "a fresh conversion computes the base's logits, bitwise",
    "generation": "so does generation with a cache and left padding",
    "records": "so are hidden states and attentions that are recorded",
    "saving": "a model with separate streams is saved, loaded, and computes the same bits",
    "checkpointing": "its gradients are the same bits with activation checkpointing, and reach all hyper-connections",
    "from_newest": "saved on the newest release, it loads here without the package and computes and generates the same",
    "to_newest": "saved here, it does so on the newest release",
}
# Of models of several modalities, by the tests of tests/modeling/test_composite_models.py.
COMPOSITE_CHECKS = {
    "image": "logits with an image or sound are the base's, bitwise at n = 3 and 4, and removal gives the base back",
    "image, generation": "so does generation with a cache and left padding",
    "image, saving": "a model with separate streams is saved and loaded by the Auto class, and base keys stay",
    "image, checkpointing": "its gradients are the same with activation checkpointing",
}


@dataclass(frozen=True)
class Outcome:
    """Of one check of one variant: nothing to say if it passed, else the reason, and whose it is."""

    reason: str = ""
    native: bool = False  # whether the family's own model fails as well

    @property
    def passed(self) -> bool:
        return not self.reason

    @property
    def ours(self) -> bool:
        return bool(self.reason) and not self.native


Results = Mapping[str, Mapping[str, Outcome]]  # by check, by variant


def words(error: BaseException) -> str:
    """An error in one line."""
    first = str(error).strip().splitlines() or [""]
    return textwrap.shorten(f"{type(error).__name__}: {first[0]}", 160, placeholder="...")


def compare(native: Callable[[], Any], ours: Callable[[], Any]) -> Outcome:
    """Runs a check on the family's own model, and on ours if that passes.

    Both return what is wrong, in words, and nothing if all is well.
    """
    for run, is_native in ((native, True), (ours, False)):
        try:
            reason = run()
        except Exception as error:
            reason = words(error)
        if reason:
            return Outcome(reason, is_native)
    return Outcome()


def to_json(results: Results) -> dict[str, Any]:
    """Of one release: per check how many variants passed, and the reasons of the others."""
    summary: dict[str, Any] = {}
    for check, outcomes in results.items():
        reasons: dict[str, list[str]] = defaultdict(list)
        for variant, outcome in outcomes.items():
            if not outcome.passed:
                reasons[f"{'native' if outcome.native else 'ours'}: {outcome.reason}"].append(variant)
        summary[check] = {"variants": len(outcomes), "passed": sum(o.passed for o in outcomes.values())}
        summary[check] |= {"reasons": {reason: sorted(names) for reason, names in sorted(reasons.items())}}
    return summary


def ours(summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Everything that failed and is not the host's fault."""
    return [
        f"{release}, {check}, {', '.join(names)}: {reason.removeprefix('ours: ')}"
        for release, checks in summaries.items()
        for check, summary in checks.items()
        for reason, names in summary["reasons"].items()
        if reason.startswith("ours: ")
    ]


def tables(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """The results of all releases in Markdown: of text models, and of models of several modalities."""
    return "\n".join([*_table(summaries, CHECKS), "", *_table(summaries, COMPOSITE_CHECKS)]).rstrip()


def _table(summaries: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str]) -> list[str]:
    """One table, and under it the reason of each cell that does not say yes."""
    lines = [f"| transformers | variants | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for release, checks in summaries.items():
        cells = [_cell(checks.get(check)) for check in columns]
        variants = next((checks[check]["variants"] for check in columns if check in checks), "")
        lines.append(f"| {release} | {variants} | {' | '.join(cells)} |")
    legend = [f"- **{check}**: {meaning}." for check, meaning in columns.items()]
    return [*lines, "", *legend, "", *_notes(summaries, columns)]


def _cell(summary: Mapping[str, Any] | None) -> str:
    if summary is None:
        return ""  # models are exchanged with this release
    return f"{summary['passed']} of {summary['variants']}" if summary["reasons"] else "yes"


def _notes(summaries: Mapping[str, Mapping[str, Any]], columns: Iterable[str]) -> list[str]:
    """One line for each reason: whose it is, the variants, and where it was found."""
    found: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for release, checks in summaries.items():
        for check in columns:
            for reason, names in checks.get(check, {"reasons": {}})["reasons"].items():
                found[reason, ", ".join(names)][release].append(check)
    lines = []
    for (reason, names), places in found.items():
        whose, _, what = reason.partition(": ")
        blame = "the native model as well" if whose == "native" else "**ours alone**"
        # Releases with the same checks stand together.
        together: dict[str, list[str]] = defaultdict(list)
        for release, failed in places.items():
            together[", ".join(failed)].append(release)
        where = "; ".join(f"{', '.join(releases)}: {failed}" for failed, releases in together.items())
        lines.append(f"- {names}, {blame}: {what.replace('<', '&lt;').rstrip('.:')}. ({where})")
    return lines


def merged(parts: Iterable[Results]) -> dict[str, dict[str, Outcome]]:
    """The results of one release from several processes."""
    together: dict[str, dict[str, Outcome]] = {}
    for part in parts:
        for check, outcomes in part.items():
            together.setdefault(check, {}).update(outcomes)
    return together
