"""Rows read from the source of layers, held against the table's on the oldest release and the newest."""

import subprocess
import sys
import tempfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hosts.releases import FLOOR, ROOT, environment, matrix


def main() -> int:
    releases, failed = (FLOOR, matrix()[-1]), 0
    for release in releases:
        with tempfile.TemporaryDirectory() as home:
            command = [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests/test_derivation.py")]
            done = subprocess.run(command, env=environment(release, ROOT, Path(home)), cwd=ROOT)
        print(f"transformers {release}: {'as the table' if done.returncode == 0 else 'FAILED'}")
        failed += done.returncode != 0
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
