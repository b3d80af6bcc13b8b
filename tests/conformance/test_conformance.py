"""A short part of transformers' own tests on KromHC; the whole is `make conformance`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from distribution import download, fetch_suite


RUN = Path(__file__).with_name("run.py")
# One of each kind of layer; qwen3, a llama with norms in its attention, is in `make conformance` alone.
FAMILIES = ("llama", "gpt2", "gpt_neox", "mixtral", "gemma2")


@pytest.fixture(scope="session")
def suite():
    return fetch_suite()


# In a process of its own: the suite changes what transformers does, and has pytest markers of its own.
def test_common_tests_of_transformers(suite, tmp_path):
    page = tmp_path / "conformance.md"
    chosen = [word for family in FAMILIES for word in ("--family", family)]
    command = [sys.executable, str(RUN), "--short", *chosen, "--jobs", "1", "--write", str(page)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed, 0 failures of ours" in done.stdout
    written = page.read_text(encoding="utf-8")
    assert f"of transformers {transformers.__version__}," in written
    assert re.search(r"^Found on \d{4}-\d\d-\d\d by `make conformance`", written, re.MULTILINE)
    passed = dict(re.findall(r"^\| (\w+) \| (\d+) \|", written, re.MULTILINE))
    assert tuple(passed) == FAMILIES
    assert all(int(count) >= 50 for count in passed.values()), passed


def test_a_distribution_that_cannot_be_fetched_fails_with_a_message(tmp_path):
    with pytest.raises(
        RuntimeError, match=r"(?s)need the source distribution of transformers 0\.0\.0\.dev1.*put transformers"
    ):
        download("0.0.0.dev1", tmp_path)


def test_the_suite_is_the_one_of_the_installed_version(suite):
    assert suite.parent.name == f"transformers-{transformers.__version__}"
    assert (suite / "test_training_mixin.py").is_file()
