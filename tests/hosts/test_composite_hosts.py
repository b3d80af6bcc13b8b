"""A sample of models of several modalities on the oldest and on the newest release of transformers."""

import os
import re
import subprocess
import sys

import pytest
import transformers
from hosts.releases import FLOOR, ROOT, install, newest


# Plain, with features between the layers, with towers of its own, through a causal language model, of sound.
SAMPLE = ("llava", "qwen3_vl", "gemma3", "blip-2", "voxtral")
TESTS = 4


@pytest.mark.parametrize("which", ["oldest", "newest"])
def test_a_sample_of_composite_models(which):
    try:
        release = FLOOR if which == "oldest" else newest()
        if release == transformers.__version__:
            pytest.skip("the release is the installed one, on which all of these tests are run beside this one")
        folder = install(release)
    except RuntimeError as error:
        pytest.skip(f"the release cannot be installed: {error}")
    names = [f"[{name}]" for name in SAMPLE]
    path = os.pathsep.join(map(str, (folder, ROOT, ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/modeling/test_composite_models.py"]
        + ["-k", " or ".join(names)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    found = re.search(r"^(\d+) passed", done.stdout, re.MULTILINE)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert found is not None
    assert int(found[1]) == TESTS * len(SAMPLE)
