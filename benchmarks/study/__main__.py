"""Runs a study of what retrofitted hyper-connections buy: arms x seeds, paired, with error bars.

python -m benchmarks.study benchmarks/studies/small.yaml --output out/small  # table, summary.json, pictures
python -m benchmarks.study STUDY.yaml --output FOLDER --measure-cost  # cost.json alone, quiet machine
python -m benchmarks.study STUDY.yaml --output FOLDER --compare published.json  # exit 1 if they disagree
python -m benchmarks.study STUDY.yaml --output FOLDER --device cuda  # bf16 by autocast
python -m benchmarks.study STUDY.yaml --output FOLDER --dry-run  # a hundredth of the steps, one window each, one seed

Arms with the same seed see the same batches, so their losses are compared in pairs. Every run is one file in
FOLDER/runs; a run that is there with the same settings is not done again, so an interrupted study goes on where it was.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


# Before transformers is imported: a study never looks anything up.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from kromhc_hf.quiet import quiet
from kromhc_hf.study.arm import StudyError
from kromhc_hf.study.cost import at_equal_time, measure_costs, read_costs
from kromhc_hf.study.report import draw_curves, draw_differences, summarize, table
from kromhc_hf.study.runs import execute, results, write_atomically
from kromhc_hf.study.statistics import agreements
from kromhc_hf.study.study_file import load_study, rehearsal
from kromhc_hf.study.timing import device_name
from kromhc_hf.study.tuning import tuned


DEFAULT_SHARED = Path(__file__).resolve().parents[3] / "shared"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns 0, 1 where `--compare` finds a disagreement, and 2 for what the user can mend."""
    options = parse(argv)
    try:
        return study(options)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with the runs that are left", file=sys.stderr)
        return 130


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="YAML file with defaults, arms, seeds and a reference")
    parser.add_argument("--output", type=Path, required=True, help="folder for runs, summary and pictures")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument(
        "--shared",
        type=Path,
        default=os.environ.get("KROMHC_SHARED", DEFAULT_SHARED),
        help="folder that the paths of models and texts start from",
    )
    parser.add_argument("--compare", type=Path, help="a published summary.json that the results must agree with")
    parser.add_argument("--measure-cost", action="store_true", help="measure the cost of the arms' steps and stop")
    parser.add_argument("--rounds", type=int, default=15, help="of --measure-cost")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for bf16 by autocast on one card, one worker")
    parser.add_argument("--text", help="another text for all arms, by its path in the shared folder")
    parser.add_argument("--dry-run", action="store_true", help="see that it runs: the numbers say nothing")
    options = parser.parse_args(argv)
    if options.device != "cpu":
        options.workers = 1
    if options.workers < 1:
        parser.error(f"--workers must be at least 1; got {options.workers}. Use the number of free cores.")
    return options


def study(options: argparse.Namespace) -> int:
    quiet()
    changes = {} if options.text is None else {"text": options.text}
    plan = load_study(options.study, options.shared, changes)
    if options.dry_run:
        plan = rehearsal(plan)
    if options.measure_cost:
        measure_costs(plan, options.output, options.shared, options.rounds, options.device)
    costs = read_costs(plan, options.output)
    published = None if options.compare is None else read_summary(options.compare)
    if options.measure_cost:
        for name, times in costs.items():
            print(f"{name}: {times:.2f} times a step of {plan.compared_with(name)}")
        return 0
    plan = at_equal_time(plan, costs)
    plan = tuned(plan, options.output, options.shared, options.workers, options.device)
    execute(plan, options.output, options.shared, options.workers, options.device)
    summary = summarize(plan, results(plan, options.output, options.shared), costs, machine(options))
    write_atomically(options.output / "summary.json", summary)
    draw_differences(summary, options.output / "differences.png")
    draw_curves(summary, plan.curves, options.output / "curves.png")
    print(table(summary))
    return 0 if published is None else compare(summary, published)


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers may depend on beside the settings."""
    packages = {package: version(package) for package in ("torch", "transformers", "kromhc-hf")}
    where = {"device": "cpu", "processor": platform.machine(), "threads per run": 1}
    if options.device != "cpu":
        where = {"device": options.device, "name": device_name(options.device)}
    return {"study": options.study.name, **where, **packages}


def read_summary(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(f"--compare must be a summary.json that this command wrote; got {path}: {error}") from error


def compare(summary: dict[str, Any], published: dict[str, Any]) -> int:
    """Prints for each arm whether it agrees with the published number. Returns 1 if one does not."""
    try:
        found = agreements(summary, published)
    except ValueError as error:
        raise StudyError(str(error)) from error
    print("\n| arm | compared | here | published | apart | allowed | agrees |\n|" + "---|" * 7)
    for one in found:
        numbers = " | ".join(f"{number:.4f}" for number in (one.here, one.published, one.apart, one.allowed))
        print(f"| {one.arm} | {one.quantity.replace('_', ' ')} | {numbers} | {'yes' if one.holds else 'NO'} |")
    return 0 if all(one.holds for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
