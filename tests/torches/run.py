"""The arithmetic of hyper-connections, compiled too, on releases of torch: `run.py --write docs/torch-releases.md`.

Each release is installed into `.torches` (`KROMHC_TORCHES`), some gigabytes where the index has builds for GPUs alone,
and removed again unless `--keep`. What came out goes into a JSON file beside the page, from which its table is made.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kromhc_hf.families_table import put_between


ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("KROMHC_TORCHES", ROOT / ".torches"))
# The floor of pyproject.toml, and the last patch of every minor release after it.
RELEASES = ("2.6.0", "2.7.1", "2.8.0", "2.9.1", "2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
TESTS = ("tests/modeling/test_kernels.py", "tests/modeling/test_derivatives.py", "tests/modeling/test_mixing.py")
BEGIN, END = "<!-- torch-releases:begin -->", "<!-- torch-releases:end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", nargs="+", default=RELEASES, help="by default all")
    parser.add_argument("--keep", action="store_true", help="leave the releases in their folders")
    parser.add_argument("--write", type=Path, required=True, help="the page to put the table into")
    options = parser.parse_args()
    known = options.write.with_suffix(".json")
    found: dict[str, dict[str, Any]] = json.loads(known.read_text()) if known.exists() else {}
    for release in options.release:
        print(f"torch {release}", flush=True)
        found[release] = outcome(release)
        print(f"  {found[release]}", flush=True)
        if not options.keep:
            shutil.rmtree(FOLDER / release)
    found = dict(sorted(found.items(), key=lambda item: [int(part) for part in item[0].split(".")]))
    known.write_text(json.dumps(found, indent=2) + "\n")
    put_between(options.write, BEGIN, END, table(found))
    sys.exit(any(found[release]["failed"] for release in options.release))


def outcome(release: str) -> dict[str, Any]:
    """How many tests pass and fail on a release, where, and when.

    Raises:
        RuntimeError: if the tests do not run to their end.
    """
    folder = install(release)
    path = os.pathsep.join(map(str, (folder, ROOT, ROOT / "tests")))
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    # Triton is of one release of torch too, and runs on a card alone but for its interpreter.
    options = ["-q", "-p", "torches.built_for_one_torch", "-p", "no:cacheprovider", "-k", "not triton"]
    command = [sys.executable, "-m", "pytest", *options, *TESTS]
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed)", done.stdout.splitlines()[-1])}
    if done.returncode not in (0, 1) or "passed" not in counts:
        raise RuntimeError(f"the tests did not run on torch {release}:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    return {
        "date": datetime.date.today().isoformat(),
        "passed": counts["passed"],
        "failed": counts.get("failed", 0),
        "seconds": round(time.monotonic() - start),
    }


def install(release: str) -> Path:
    """The folder with a release of torch and what it needs, installed unless it is there."""
    folder = FOLDER / release
    if not folder.is_dir():
        FOLDER.mkdir(parents=True, exist_ok=True)
        # A constraint of this environment is about its own torch.
        environment = os.environ | {"PIP_CONSTRAINT": os.devnull}
        with tempfile.TemporaryDirectory(dir=FOLDER) as made:
            target = Path(made) / release
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(target), f"torch=={release}"]
            subprocess.run(command, env=environment, check=True)
            target.rename(folder)
    return folder


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = ["| torch | run on | passed | failed |", "|---|---|---|---|"]
    lines += [f"| {release} | {row['date']} | {row['passed']} | {row['failed']} |" for release, row in found.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
