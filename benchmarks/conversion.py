"""Time and memory of converting a checkpoint, beside loading it, changing it and saving it with transformers.

    python -m benchmarks.conversion [--layers 19] [--shards 40] [--folder FOLDER]

The checkpoint is a bf16 Llama of width 4096 in sparse files: 19 layers are 8.2 GB that take no room on disk. What is
saved with transformers does take it. Each way runs in a process of its own; time and memory are counted from the end of
the imports.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.sparse import sparse_llama


MEASURE = """
import json, sys, time
import kromhc_hf
from transformers import AutoModelForCausalLM, LlamaForCausalLM

def kilobytes(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

way, source, destination = sys.argv[1:]
before, start = kilobytes("VmRSS"), time.perf_counter()
if way == "through transformers":
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    kromhc_hf.apply_hyper_connections(model)
    model.save_pretrained(destination)
else:
    kromhc_hf.convert_checkpoint(source, destination, link=way)
print(json.dumps({"seconds": time.perf_counter() - start, "megabytes": (kilobytes("VmHWM") - before) / 1024}))
"""
WAYS = ("hardlink", "symlink", "copy", "through transformers")


def measure(way: str, source: Path, destination: Path) -> dict[str, float]:
    command = [sys.executable, "-c", MEASURE, way, source, destination]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{way}: {result.stderr.splitlines()[-1]}")
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=19)
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--folder", type=Path, help="where to work; needs room for two copies of the model")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as home:
        source = Path(home) / "base"
        size = sparse_llama(source, arguments.layers, arguments.shards)
        print(f"{size / 1e9:.1f} GB in {arguments.shards} shards, bf16, 4 streams")
        print(f"{'way':<22} {'seconds':>9} {'MB of memory':>13}")
        found = {}
        for number, way in enumerate(WAYS):
            found[way] = measure(way, source, Path(home) / str(number))
            print(f"{way:<22} {found[way]['seconds']:>9.2f} {found[way]['megabytes']:>13.0f}", flush=True)
        slow, fast = found["through transformers"], found["hardlink"]
        ratios = [slow[name] / fast[name] for name in ("seconds", "megabytes")]
        print(f"hardlink is {ratios[0]:.0f} times faster and takes {ratios[1]:.0f} times less memory than transformers")


if __name__ == "__main__":
    main()
