"""What the README shows runs as it stands."""

import re
from pathlib import Path

from kromhc_hf.demo import MODEL


README = Path(__file__).resolve().parents[2] / "README.md"


def test_python_examples_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/base").symlink_to(MODEL)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 5
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    trainable = [name for name, parameter in namespace["model"].named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("_hc." in name for name in trainable)
