"""Runs the checks of one client, in its environment: `python -m clients.inside CLIENT MODELS WORK OUTPUT`."""

import json
import sys
import traceback
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from clients.client import Check, Client, models_in


SHOWN = ("transformers", "torch")


def versions(client: Client) -> dict[str, str]:
    """Of the tool and of what it stands on, without what a version says of the build."""
    found = {}
    for name in (tool_of(client), *SHOWN):
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            found[name] = ""
    return found


def tool_of(client: Client) -> str:
    """`lm-eval[hf]==0.4.13` -> `lm-eval`."""
    return client.requirements[0].partition("==")[0].partition("[")[0]


def outcome_of(check: Check, models: Path, work: Path) -> tuple[str, str]:
    """Whether it works, and what was seen; the base is run first."""
    found: dict[str, Any] = {}
    for kind in ("base", "converted") if check.agree else ("converted",):
        folder = work / kind
        folder.mkdir(parents=True)
        try:
            found[kind] = check.run(models_in(models, kind), folder)
        except Exception as error:
            traceback.print_exc()
            return "fails for the base alike" if kind == "base" else "fails", said(error)
    try:
        return "works", check.agree(found["base"], found["converted"]) if check.agree else found["converted"]
    except AssertionError as error:
        return "fails", said(error)


def said(error: Exception) -> str:
    """The last line of an error, short enough for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]


def main() -> None:
    name, models, work, output = sys.argv[1], *map(Path, sys.argv[2:])
    client: Client = import_module(f"clients.{name}").CLIENT
    rows: list[dict[str, str]] = []
    for index, check in enumerate(client.checks):
        outcome, seen = outcome_of(check, models, work / str(index))
        print(f"{client.tool}: {check.what}: {outcome}: {seen}", file=sys.stderr, flush=True)
        rows.append({"what": check.what, "outcome": outcome, "seen": seen})
        # After every check, since a tool may take the process down.
        output.write_text(json.dumps({"versions": versions(client), "rows": rows}))


if __name__ == "__main__":
    main()
