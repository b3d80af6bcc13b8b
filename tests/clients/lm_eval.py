"""lm-eval: a task that needs no network, by its command and by the script among the examples."""

import json
import re
from pathlib import Path

from clients.client import Check, Client, Models, command, same


ROOT = Path(__file__).resolve().parents[2]
NUMBERS = ("word_perplexity", "byte_perplexity", "bits_per_byte")


def numbers(printed: str) -> dict[str, float]:
    """The table that lm-eval prints."""
    found = {name: re.search(rf"\|{name}\s*\|[^|]*\|\s*([\d.]+)\|", printed) for name in NUMBERS}
    assert all(found.values()), printed[-500:]
    return {name: float(match[1]) for name, match in found.items() if match}


def by_its_command(models: Models, work: Path) -> dict[str, float]:
    """As where this package is not imported: the code beside the model is run."""
    arguments = f"pretrained={models.start},trust_remote_code=True,dtype=float32"
    options = ["--include_path", ROOT / "examples/evaluation", "--tasks", "shakespeare", "--limit", "64"]
    options += ["--device", "cpu", "--batch_size", "8", "--output_path", work / "out"]
    command("lm_eval", "--model", "hf", "--model_args", arguments, *options, folder=ROOT)
    (file,) = (work / "out").rglob("results_*.json")
    results = json.loads(file.read_text())["results"]["shakespeare"]
    return {name: results[f"{name},none"] for name in NUMBERS}


def by_the_example(models: Models, work: Path) -> str:
    """The script prints the table of the base, and that of the model or adapter."""
    script = ROOT / "examples" / "evaluate.sh"
    tables = command(script, models.plain, models.start, "--adapter", models.adapter, folder=work).split(
        "|shakespeare"
    )[1:]
    base, converted, adapter = map(numbers, ("|shakespeare" + table for table in tables))
    assert base == converted == adapter, f"base {base}, converted {converted}, adapter {adapter}"
    return same(base, adapter)


CLIENT = Client(
    tool="lm-eval",
    requirements=("lm-eval[hf]==0.4.13",),
    use="`lm_eval --model hf --model_args pretrained=MODEL,trust_remote_code=True`. For an adapter of "
    "hyper-connections the package has to be imported, see `examples/evaluate.sh`.",
    checks=(
        Check("`lm_eval --model hf` on the lines of a text", by_its_command, same),
        Check("`examples/evaluate.sh BASE CONVERTED --adapter ADAPTER`", by_the_example),
    ),
)
