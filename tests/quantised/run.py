"""Runs every scheme in a process of its own: `run.py --write docs/quantised-bases.md`, or `run.py --scheme gptq`.

What came out goes into a JSON file beside the page, from which its table is made.
"""

import argparse
import datetime
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hosts.outcomes import Outcome
from quantised.check import CHECKS, REFUSED, into_file
from quantised.schemes import SCHEMES
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from kromhc_hf.families_table import put_between


BEGIN, END = "<!-- quantised:begin -->", "<!-- quantised:end -->"
# How many seconds one scheme may take.
LIMIT = 1200
# What the page names of the packages that are installed.
NAMED = (
    *("transformers", "torch", "bitsandbytes", "torchao", "compressed-tensors", "gptqmodel", "auto-round", "aqlm"),
    *("optimum-quanto", "hqq"),
)
# Of other files than those that are converted; their message is in conversion/other_weights.py.
ELSEWHERE = {"gguf"}

Found = dict[str, dict[str, Any] | None]


def run(name: str) -> Found:
    """What is found of a scheme; what it imports and changes stays in its process."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        process = multiprocessing.get_context("fork").Process(target=into_file, args=(output, name))
        process.start()
        process.join(LIMIT)
        if output.is_file():
            return json.loads(output.read_text())
        process.kill()
        return {**dict.fromkeys(CHECKS), "logits": {"reason": "the process ended without a result", "native": False}}


def outcomes(found: Found) -> dict[str, Outcome | None]:
    return {check: outcome and Outcome(**outcome) for check, outcome in found.items()}


def table(schemes: Mapping[str, Found]) -> str:
    """The results in Markdown: a row for each scheme, what the columns mean, and the reasons."""
    numbers: dict[tuple[bool, str], int] = {}
    lines = [f"| scheme | {' | '.join(CHECKS)} |", "|---" * (len(CHECKS) + 1) + "|"]
    for name, found in schemes.items():
        lines.append(f"| {name} | {' | '.join(cell(one, numbers) for one in outcomes(found).values())} |")
    legend = [f"- **{check}**: {meaning}." for check, meaning in CHECKS.items()]
    reasons = [
        f"{number}. {'The base itself: ' * native}{reason.replace('<', '&lt;').rstrip('.:')}."
        for (native, reason), number in numbers.items()
    ]
    return "\n".join([*lines, "", *legend, "", *reasons])


def cell(outcome: Outcome | None, numbers: dict[tuple[bool, str], int]) -> str:
    if outcome is None:
        return ""
    if outcome.passed:
        return "yes"
    return f"no ({numbers.setdefault((outcome.native, outcome.reason), len(numbers) + 1)})"


def left_out() -> list[str]:
    """The methods of transformers that have no scheme here."""
    methods = {method.removesuffix("_4bit").removesuffix("_8bit") for method in AUTO_QUANTIZER_MAPPING}
    return sorted(methods - {scheme.method for scheme in SCHEMES.values()} - ELSEWHERE)


def shown(content: dict[str, Any]) -> str:
    """What stands between the markers: when and with what it was last run, and the table."""
    head = f"Last run on {content['date']} on a CPU, with {', '.join(content['packages'])}."
    return f"{head}\n\n{table(content['schemes'])}"


def write(page: Path, schemes: dict[str, Found]) -> None:
    """Puts the results beside a page, and the table between its markers.

    Those of other schemes stay if they were found with the same packages.
    """
    beside, packages = page.with_suffix(".json"), [f"{name} {version(name)}" for name in NAMED]
    if beside.is_file() and (before := json.loads(beside.read_text(encoding="utf-8")))["packages"] == packages:
        schemes = {**before["schemes"], **schemes}
    content = {
        "date": datetime.date.today().isoformat(),
        "packages": packages,
        "schemes": {name: schemes[name] for name in SCHEMES if name in schemes},
    }
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    put_between(page, BEGIN, END, shown(content))


def failures(schemes: Mapping[str, Found]) -> list[str]:
    """What is neither as it should be nor the host's fault."""
    return [
        f"{name}, {check}: {outcome.reason}"
        for name, found in schemes.items()
        for check, outcome in outcomes(found).items()
        if outcome is not None and outcome.ours and outcome.reason != REFUSED
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scheme", action="append", choices=SCHEMES, help="all if not given")
    parser.add_argument("--write", type=Path, help="page for the table of results")
    options = parser.parse_args()
    if missing := left_out():
        raise SystemExit(f"a scheme is needed for {', '.join(missing)}, which transformers knows")
    found = {}
    for name in options.scheme or SCHEMES:
        found[name] = run(name)
        if options.write is not None:
            write(options.write, {name: found[name]})
    print(table(found))
    for failure in failures(found):
        print(failure, file=sys.stderr)
    return 1 if failures(found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
