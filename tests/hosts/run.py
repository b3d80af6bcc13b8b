"""Sweeps releases of transformers: `run.py --write docs/hosts.md`, or `run.py --release 5.6.2 --variant llama`.

What came out goes into a JSON file beside the page, from which its table is made. Models are exchanged with the last of
the releases that are run.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from hosts.outcomes import Outcome, merged, ours, tables, to_json
from hosts.releases import ROOT, environment, matrix, number

from kromhc_hf.families_table import put_between


BEGIN, END = "<!-- hosts:begin -->", "<!-- hosts:end -->"
HERE = Path(__file__).resolve().parent
Found = dict[str, dict[str, Outcome]]


def process(script: str, release: str, arguments: Sequence[str], work: Path, bare: bool = False) -> Found:
    """What a script of this folder finds on a release.

    Args:
        script: its name; its first argument is the file for what it finds.
        release: of transformers.
        arguments: the others.
        work: where it leaves files.
        bare: whether it runs where the package is not installed.
    """
    output = work / f"{script}-{release}.json"
    # Without `site` an editable install of the package is not seen; everything else is where torch is.
    path, options = (Path(torch.__file__).parents[1], ["-S"]) if bare else (ROOT, [])
    variables = environment(release, path, home=work / f"home-{release}")
    command = [sys.executable, *options, str(HERE / script), str(output), *arguments]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise RuntimeError(f"{script} failed on transformers {release}:\n{done.stderr[-3000:]}")
    content = json.loads(output.read_text())
    if content["version"] != release:
        raise RuntimeError(f"transformers {release} must be imported; got {content['version']}")
    return {
        check: {name: Outcome(**outcome) for name, outcome in outcomes.items()}
        for check, outcomes in content["results"].items()
    }


def sweep(release: str, work: Path, variants: Sequence[str] = ()) -> Found:
    """The checks of `sweep.py`; the saved models stay in a folder named after the release.

    Args:
        release: of transformers.
        work: an empty folder, or that of other releases.
        variants: all if none are given.
    """
    return process("sweep.py", release, [str(work / release), *variants], work)


def across(saved: str, loaded: str, check: str, work: Path) -> Found:
    """The check of `across.py`: what `sweep` saved on one release is loaded on another without the package."""
    return process("across.py", loaded, [str(work / saved), check], work, bare=True)


def run(releases: Sequence[str], variants: Sequence[str], work: Path) -> dict[str, dict[str, Any]]:
    """The summary of every release; the last one is what models are exchanged with."""
    newest, found = releases[-1], {}
    for release in reversed(releases):
        start = time.perf_counter()
        parts = [sweep(release, work, variants)]
        if not variants:
            parts.append(process("composites.py", release, [], work))
        if release != newest:
            parts += [across(newest, release, "from_newest", work), across(release, newest, "to_newest", work)]
        found[release] = to_json(merged(parts))
        print(f"{release}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return {release: found[release] for release in releases}


def write(page: Path, summaries: dict[str, dict[str, Any]]) -> None:
    """Puts the results beside a page, where those of other releases stay, and the table between its markers."""
    beside = page.with_suffix(".json")
    if beside.is_file():
        summaries = {**json.loads(beside.read_text(encoding="utf-8"))["releases"], **summaries}
    content = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        "releases": {release: summaries[release] for release in sorted(summaries, key=number)},
    }
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    put_between(page, BEGIN, END, shown(content))


def shown(content: dict[str, Any]) -> str:
    """The results in Markdown: when and with what they were found, and the table."""
    head = f"Found on {content['date']} by `make hosts`, with torch {content['torch']} on Python {content['python']}."
    return f"{head}\n\n{tables(content['releases'])}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--release", action="append", help="the matrix and the newest on the index, if not given")
    parser.add_argument("--variant", action="append", default=[], help="such as llama or falcon-1; all if not given")
    parser.add_argument("--write", type=Path, help="page for the table of results")
    options = parser.parse_args()
    releases = sorted(options.release or matrix(), key=number)
    with tempfile.TemporaryDirectory() as work:
        summaries = run(releases, options.variant, Path(work))
    if options.write is not None:
        write(options.write, summaries)
    print(tables(summaries))
    failures = ours(summaries)
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
