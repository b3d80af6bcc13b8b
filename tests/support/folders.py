"""What is in a folder."""

import json
import shutil
from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def only(tmp_path: Path, *names: str) -> bool:
    return sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def to_earlier_layout(converted: Path, destination: Path) -> None:
    """A copy of a converted single-file base as it was written before its files had standard names."""
    shutil.copytree(converted, destination)
    names = {"model-00001-of-00002.safetensors": "model.safetensors"}
    names["model-00002-of-00002.safetensors"] = "kromhc.safetensors"
    for name, earlier in names.items():
        (destination / name).rename(destination / earlier)
    index = destination / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {tensor: names[file] for tensor, file in content["weight_map"].items()}
    index.with_name("kromhc.safetensors.index.json").write_text(json.dumps(content))
    index.unlink()
    config = json.loads((destination / "config.json").read_text())
    config["transformers_weights"] = "kromhc.safetensors.index.json"
    (destination / "config.json").write_text(json.dumps(config))
