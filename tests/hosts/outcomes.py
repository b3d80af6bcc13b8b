"""What is checked of every family on every release, what came out, and the table of it."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


# In the order of the columns.
CHECKS = {
    "logits": "logits of a fresh conversion, bitwise",
    "generation": "cached generation with left padding, bitwise",
    "records": "recorded hidden states and attentions, bitwise",
    "saving": "saved and loaded again with separate streams",
    "checkpointing": "gradients with activation checkpointing, bitwise",
    "from_newest": "saved on the newest release, loaded here without the package",
    "to_newest": "saved here, loaded on the newest release without the package",
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
    return f"{type(error).__name__}: {first[0]}"[:160]


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


def table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """The results of all releases in Markdown, and under it the reason of each cell that does not say yes."""
    lines = [f"| transformers | variants | {' | '.join(CHECKS.values())} |", "|---" * (len(CHECKS) + 2) + "|"]
    notes: list[str] = []
    for release, checks in summaries.items():
        cells = [_cell(release, check, checks.get(check), notes) for check in CHECKS]
        lines.append(f"| {release} | {checks['logits']['variants']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *notes])


def _cell(release: str, check: str, summary: Mapping[str, Any] | None, notes: list[str]) -> str:
    if summary is None:
        return ""
    if not summary["reasons"]:
        return "yes"
    for reason, names in summary["reasons"].items():
        whose, _, what = reason.partition(": ")
        blame = "the native model as well" if whose == "native" else "**ours alone**"
        what = what.replace("|", "\\|").replace("<", "&lt;")
        notes.append(f"- {release}, {CHECKS[check]}: {', '.join(names)} ({blame}): {what}")
    return f"{summary['passed']} of {summary['variants']}"


def merged(parts: Iterable[Results]) -> dict[str, dict[str, Outcome]]:
    """The results of one release from several processes."""
    together: dict[str, dict[str, Outcome]] = {}
    for part in parts:
        for check, outcomes in part.items():
            together.setdefault(check, {}).update(outcomes)
    return together
