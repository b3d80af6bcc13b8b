"""Runs transformers' common tests: `run.py --write docs/conformance.md`, or `run.py --short --family llama`."""

import argparse
import datetime
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from cases import FAILED, FAMILIES, PASSED, SKIPPED, Outcome, names_of_tests, run_case


STATUSES = (PASSED, SKIPPED, FAILED)
# Many parameterisations of one comparison, tests of other modalities, and the slowest.
NOT_SHORT = ("test_eager_matches_sdpa_inference", "test_get_", "test_training_overfit", "test_bc_torch_dtype")


def timed(case: tuple[str, str]) -> tuple[str, str, Outcome, float]:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    start = time.perf_counter()
    return *case, run_case(*case), time.perf_counter() - start


def table(results: list[tuple[str, str, Outcome, float]]) -> str:
    """The results per family in Markdown, and what failed natively as well."""
    lines = ["# Conformance", ""]
    lines += [f"The common model and training tests of transformers {transformers.__version__}, from its own source"]
    lines += ["distribution, run on KromHC classes (4 streams, init identity) with the native class as control: a test"]
    lines += [
        "that fails or is skipped for KromHC and passes natively counts as a failure of ours. The distribution does"
    ]
    lines += ["not carry the generation, export and distributed tests.", ""]
    lines += [f"Found on {datetime.date.today()} by `make conformance`, with torch {torch.__version__}.", ""]
    lines += [
        "| family | passed | skipped for both | fail natively as well | failures of ours |",
        "|---|---|---|---|---|",
    ]
    for family in dict.fromkeys(family for family, *_ in results):
        outcomes = [outcome for name, _, outcome, _ in results if name == family]
        counts = [sum(outcome.status == status and not outcome.ours for outcome in outcomes) for status in STATUSES]
        lines.append(f"| {family} | {counts[0]} | {counts[1]} | {counts[2]} | {sum(o.ours for o in outcomes)} |")
    shared = [(family, name) for family, name, outcome, _ in results if outcome.status == FAILED and not outcome.ours]
    lines += ["", "Failing natively as well:", ""] if shared else []
    for name in dict.fromkeys(name for _, name in shared):
        lines.append(f"- `{name}`: {', '.join(family for family, other in shared if other == name)}")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", action="append", choices=FAMILIES, help="all if not given")
    parser.add_argument("--short", action="store_true", help="leave out what takes longest and says least")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", type=Path, help="file for the table of results")
    options = parser.parse_args()
    cases = [(family, name) for family in options.family or FAMILIES for name in names_of_tests(family)]
    if options.short:
        cases = [(family, name) for family, name in cases if not name.startswith(NOT_SHORT)]
    with ProcessPoolExecutor(max_workers=options.jobs) as pool:
        results = list(pool.map(timed, cases, chunksize=4))
    if options.write is not None:
        options.write.write_text(table(results), encoding="utf-8")
    ours = [(family, name, outcome) for family, name, outcome, _ in results if outcome.ours]
    for family, name, outcome in ours:
        print(f"{family} {name}: {outcome.status} for KromHC, {outcome.native} natively\n{outcome.detail}\n")
    for family, name, _, seconds in sorted(results, key=lambda result: -result[3])[:10]:
        print(f"{seconds:6.1f} s  {family} {name}", file=sys.stderr)
    passed = sum(outcome.status == PASSED for _, _, outcome, _ in results)
    print(f"{len(results)} tests, {passed} passed, {len(ours)} failures of ours")
    return 1 if ours else 0


if __name__ == "__main__":
    raise SystemExit(main())
