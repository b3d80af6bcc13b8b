"""Converts a checkpoint again and again, each time in a process that is killed at a random moment.

Arguments: source, folder for the destinations, how often. Prints how many destinations were complete and how many left
something behind, as JSON.
"""

import json
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

from forked import exit_code, fork

from kromhc_hf import convert_checkpoint


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


source, home, times = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
before = contents(source)
# Everything is imported and built once, so that the moments fall into the conversion itself.
convert_checkpoint(source, home / "whole")
start = time.perf_counter()
convert_checkpoint(source, home / "measured")
duration = time.perf_counter() - start
whole = contents(home / "whole")
card = "README.md"  # it names the folder

counts = {"complete": 0, "absent": 0, "leftovers": 0, "finished": 0}
random.seed(0)
for moment in range(times):
    destination = home / f"out-{moment % 3}"
    child = fork(partial(convert_checkpoint, source, destination))
    # Moments after the end are of interest too: the folder must be there then.
    time.sleep(random.uniform(0, 1.2 * duration))
    os.kill(child, signal.SIGKILL)
    counts["finished"] += exit_code(child) == 0
    counts["leftovers"] += bool(list(home.glob(f".{destination.name}.partial-*")))
    if destination.exists():
        found = contents(destination)
        assert found.keys() == whole.keys(), moment
        assert all(found[name] == whole[name] for name in found if name != card), moment
        counts["complete"] += 1
        for path in destination.iterdir():
            path.unlink()
        destination.rmdir()
    else:
        counts["absent"] += 1
assert contents(source) == before
for number in range(3):
    convert_checkpoint(source, home / f"out-{number}")
counts["names"] = sorted(path.name for path in home.iterdir())
print(json.dumps(counts))
