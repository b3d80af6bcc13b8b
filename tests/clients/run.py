"""Runs the tools that people already use: `make clients`, or `make clients CLIENTS="lm_eval mergekit"`.

Each has a file of its own beside this one and an environment of its own in `.clients` (`KROMHC_CLIENTS`). What came out
goes into a JSON file beside the page, from which the page is made; rows of clients that were not run stay.
"""

import argparse
import datetime
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from clients.client import Client
from packaging.requirements import Requirement

from kromhc_hf.families_table import put_between
from scripts.resolve import first_error


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = Path(os.environ.get("KROMHC_CLIENTS", ROOT / ".clients"))
SUMMARY = ROOT / "kromhc_hf" / "works_with.json"
BEGIN, END = "<!-- clients:begin -->", "<!-- clients:end -->"
NO_CLIENTS = ("client", "inside", "made_models", "run")
LIMIT = 3600  # seconds of one client; those that compile need them
Result = dict[str, Any]


def clients() -> dict[str, Client]:
    """Every client by the name of its file, in alphabetical order."""
    names = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in NO_CLIENTS)
    return {name: import_module(f"clients.{name}").CLIENT for name in names}


def environment(name: str, client: Client) -> Path:
    """The folder with the programs of a client's environment, made anew when what it asks for has changed.

    Raises:
        RuntimeError: if pip cannot install it.
    """
    folder = FOLDER / name
    constraints = folder / "constraints.txt"
    asked = {Requirement(requirement).name for requirement in client.requirements}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = "\n".join(line for line in lines if not line.startswith("#") and Requirement(line).name not in asked)
    # What this package asks for stands in lines of its own.
    ours = re.findall(r'^ {4}"[^"]+",$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    asks = (*client.requirements, *client.without, kept, *(ours if client.package else ()), client.python)
    state = hashlib.sha256("\n".join(asks).encode()).hexdigest()
    ready = folder / ".ready"
    if not ready.is_file() or ready.read_text() != state:
        python = client.python or sys.executable
        subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)
        constraints.write_text(kept + "\n")
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-compile"]
        package = ["--editable", f"{ROOT}[peft]"] if client.package else []
        done = subprocess.run(
            [*pip, "--constraint", str(constraints), *client.requirements, *package], capture_output=True, text=True
        )
        if done.returncode != 0:
            raise RuntimeError(first_error(done.stderr))
        if client.without:
            subprocess.run([*pip[:3], "uninstall", "--quiet", "--yes", *client.without], check=True)
        ready.write_text(state)
    return folder / "bin"


def run(name: str, client: Client, models: Path, work: Path) -> Result:
    """What a client shows: when, with which versions, and a row for each of its checks."""
    today = datetime.date.today().isoformat()
    if client.source:
        row = {"what": "", "outcome": "read from source", "seen": client.source}
        return {"date": today, "versions": {}, "rows": [row]}
    output = work / "output.json"
    try:
        programs = environment(name, client)
        variables = {
            "PATH": os.pathsep.join((str(programs), os.environ["PATH"])),
            "PYTHONPATH": str(ROOT / "tests"),
            "HOME": str(work / "home"),
            "HF_HOME": str(work / "hub"),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        (work / "home").mkdir()
        arguments = ["-m", "clients.inside", name, str(models), str(work), str(output)]
        # What it prints goes to the terminal; all that counts is in its file.
        done = subprocess.run(
            [str(programs / "python"), *arguments],
            cwd=work,
            env={**os.environ, **variables},
            stdout=sys.stderr,
            stdin=subprocess.DEVNULL,
            timeout=LIMIT,
        )
        ended = f"the process ended with {done.returncode}"
    except subprocess.TimeoutExpired:
        ended = f"it took longer than {LIMIT} s"
    except RuntimeError as error:
        ended = f"pip cannot install it: {error}"
    result = json.loads(output.read_text()) if output.is_file() else {"versions": {}, "rows": []}
    missing = client.checks[len(result["rows"]) :]
    rows = [*result["rows"], *({"what": check.what, "outcome": "fails", "seen": ended} for check in missing)]
    places = {str(ROOT): "PROJECT", str(work): "WORK", str(models): "MODELS", str(FOLDER): "CLIENTS"}
    for row in rows:
        for place, word in places.items():
            row["seen"] = row["seen"].replace(place, word)
    return {"date": today, "versions": result["versions"], "rows": rows}


def not_run(client: Client) -> Result:
    """The rows of a client that has no results yet."""
    rows = [{"what": check.what, "outcome": "not run yet", "seen": ""} for check in client.checks]
    return {"date": "", "versions": {}, "rows": rows}


def page(results: dict[str, Result], listed: dict[str, Client]) -> str:
    """The table of all outcomes, then how each tool is used, in Markdown."""
    lines = ["| tool | run on | with | what was run | outcome | what was seen |", "|---|---|---|---|---|---|"]
    for name, client in listed.items():
        result = results.get(name) or not_run(client)
        used = ", ".join(f"{package} {version}" for package, version in result["versions"].items() if version)
        for row in result["rows"]:
            cells = [client.tool, result["date"], used, row["what"], row["outcome"], row["seen"]]
            lines.append("| " + " | ".join(re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in cells) + " |")
    for client in listed.values():
        lines += ["", f"## {client.tool}", "", client.use]
    return "\n".join(lines)


def summary(results: dict[str, Result], listed: dict[str, Client]) -> list[dict[str, str]]:
    """What `kromhc doctor` says of each tool: its package, how it is used, and what came out."""
    return [
        {
            "tool": listed[name].tool,
            "package": Requirement(listed[name].requirements[0]).name,
            "use": re.sub(r"\[([^\]]*)\]\(([^)]*)\)", r"\1 (docs/\2)", listed[name].use).replace("`", ""),
            "outcome": ", ".join(dict.fromkeys(row["outcome"] for row in result["rows"])),
            "date": result["date"],
        }
        for name, result in results.items()
    ]


def write(file: Path, found: dict[str, Result]) -> None:
    """Puts results into the JSON file beside a page, where those of other clients stay, and between its markers.

    The package gets a summary of them.
    """
    listed, beside = clients(), file.with_suffix(".json")
    before = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    both = {**before, **found}
    results = {name: both[name] for name in listed if name in both}
    beside.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    put_between(file, BEGIN, END, page(results, listed))
    SUMMARY.write_text(json.dumps(summary(results, listed), indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if something fails that does not fail for the base alike."""
    listed = clients()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=f"all if not given: {', '.join(listed)}")
    parser.add_argument("--write", type=Path, help="page for the results")
    options = parser.parse_args(arguments)
    unknown = set(options.clients) - set(listed)
    if unknown:
        parser.error(f"there is no client {', '.join(sorted(unknown))}; there are {', '.join(listed)}.")
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
        subprocess.run([sys.executable, "-m", "clients.made_models", str(models)], env=variables, check=True)
        for name in options.clients or listed:
            work = Path(folder) / name
            work.mkdir()
            result = run(name, listed[name], models, work)
            for row in result["rows"]:
                print(f"{name}: {row['what']}: {row['outcome']}: {row['seen']}", flush=True)
                failed += [name] * (row["outcome"] == "fails")
            # After each, since all together take long.
            if options.write:
                write(options.write, {name: result})
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
