"""DeepSpeed ZeRO on two gloo ranks, by the tests of tests/test_deepspeed.py."""

import re
import sys
from pathlib import Path

from clients.client import Check, Client, Models, command


TESTS = Path(__file__).resolve().parents[1] / "test_deepspeed.py"


def tests_pass(models: Models, work: Path) -> str:
    printed = command(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS, folder=work)
    passed = re.findall(r"(\d+) passed", printed)
    assert passed, printed[-300:]
    assert "skipped" not in printed, printed[-300:]
    return f"{passed[0]} tests passed: first losses of the base within 1e-6, checkpoints resume with the same losses"


CLIENT = Client(
    tool="DeepSpeed",
    requirements=("deepspeed==0.19.8", "accelerate", "datasets", "pytest"),
    use="`import kromhc_hf` in the training script and a Trainer with `deepspeed=`; in bfloat16 with `torch_autocast`, "
    "see [many processes](training.md#many-processes).",
    checks=(Check("Trainer with ZeRO-2 and ZeRO-3, with and without zero.Init, two gloo ranks", tests_pass),),
)
