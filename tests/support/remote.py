"""Runs `remote_session.py` where everything but kromhc_hf is installed."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def visit_without_kromhc(folder: Path, sources: Mapping[str, Path], **environment: str) -> dict[str, dict[str, Any]]:
    """What the session reports of each source.

    Args:
        folder: where a fresh virtual environment and an empty cache are made.
        sources: folders or Hub ids, and where each is saved again.
        environment: variables for the session beside the usual ones.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "environment"], check=True)
    (site_packages,) = (folder / "environment").glob("lib/python*/site-packages")
    # A path file inside a folder that a path file names is not read, so the editable install stays out.
    (site_packages / "others.pth").write_text(str(Path(torch.__file__).parents[1]))
    given = {
        "PATH": os.environ["PATH"],
        "HF_HOME": str(folder / "hf-home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    pairs = [str(argument) for pair in sources.items() for argument in pair]
    result = subprocess.run(
        [folder / "environment/bin/python", Path(__file__).with_name("remote_session.py"), *pairs],
        env={**given, **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])
