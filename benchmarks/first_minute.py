"""What a new user waits for: user time of commands as a multiple of importing transformers, all in turn in one run.

python -m benchmarks.first_minute [--rounds 5]
"""

import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence

from benchmarks.measuring import arguments, report


PYTHON = [sys.executable, "-c"]
TRANSFORMERS = [*PYTHON, "import transformers"]
AUTO = [*PYTHON, "from transformers import AutoModelForCausalLM"]
KROMHC = [sys.executable, "-m", "kromhc_hf.cli"]
# What is run, what it is held against, and the goal: seconds above it, or times it.
CASES = [
    ("kromhc --help", [*KROMHC, "--help"], TRANSFORMERS, "+0.3 s"),
    ("kromhc convert --help", [*KROMHC, "convert", "--help"], TRANSFORMERS, "+0.3 s"),
    ("kromhc convert, without arguments", [*KROMHC, "convert"], TRANSFORMERS, "+0.3 s"),
    ("kromhc families", [*KROMHC, "families"], TRANSFORMERS, "+0.3 s"),
    ("import kromhc_hf, and AutoModelForCausalLM", [*PYTHON, f"import kromhc_hf; {AUTO[-1]}"], AUTO, "1.1 times"),
]


def user_seconds(command: Sequence[str]) -> float:
    """User time of a process and its children, in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run(command, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def main() -> None:
    options = arguments(__doc__, rounds=5).parse_args()
    options.cpu_time = True
    seconds: dict[tuple[str, ...], list[float]] = {}
    for _ in range(options.rounds + 1):  # the first round fills caches
        for command in {tuple(c): c for _, run, against, _ in CASES for c in (run, against)}.values():
            seconds.setdefault(tuple(command), []).append(user_seconds(command))
    rows = []
    for name, command, against, goal in CASES:
        own, other = (seconds[tuple(c)][1:] for c in (command, against))
        rows.append(
            {
                "command": name,
                "user s": statistics.median(own),
                "against": against[-1],
                "its user s": statistics.median(other),
                "times": statistics.median(a / b for a, b in zip(own, other)),
                "seconds above": statistics.median(a - b for a, b in zip(own, other)),
                "goal": goal,
            }
        )
    report(rows, options)


if __name__ == "__main__":
    main()
