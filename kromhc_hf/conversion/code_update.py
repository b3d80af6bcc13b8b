"""The code beside a saved model, brought up to date: weights and options stay what they are."""

import os
from pathlib import Path

from ..modeling.configuration_kromhc import KromHCConfig
from ..modeling.foreign_code import check_own_config
from ..modeling.remote_code import auto_map, code_files, files_in_the_way, is_own_code, write_code
from .files import read_json, write_json


def update_code(folder: str | os.PathLike[str]) -> list[str]:
    """Puts the code files of this version into the folder of a saved model, and names them in its config.json.

    The model then loads, without this package, on every release of transformers on which this version works. Code
    files of earlier versions that are not needed any more go. To do it on the Hub, fetch the folder, update it, and
    push it again with `push_checkpoint`.

    Args:
        folder: where a model with hyper-connections, or its configuration, was saved.

    Returns:
        The names of the files that were written or removed, in alphabetical order; none if all are up to date.

    Raises:
        FileNotFoundError: if there is no config.json.
        ValueError: if the folder is not that of a model with hyper-connections, names code of somebody else, or has
            files of somebody else where the code files go. Nothing is changed then.
    """
    folder = Path(folder)
    path = folder / "config.json"
    config_type = KromHCConfig.type_in(folder)
    content = read_json(path)
    check_own_config(content)
    if foreign := files_in_the_way(folder):
        raise ValueError(
            f"{folder} must have no files of somebody else where the code files go; got {', '.join(foreign)}. Move "
            "them to another folder."
        )
    names = {file.name: file.read_bytes() for file in code_files()}
    old = [file for file in folder.glob("*.py") if file.name not in names and is_own_code(file)]
    changed = {
        name for name, new in names.items() if not (folder / name).is_file() or (folder / name).read_bytes() != new
    }
    # The old names in config.json lead to old files, which go last.
    write_code(folder)
    if content.get("auto_map") != auto_map(config_type):
        partial = folder / "config.json.partial"
        write_json(partial, {**content, "auto_map": auto_map(config_type)})
        os.replace(partial, path)
        changed.add(path.name)
    for file in old:
        file.unlink()
    return sorted(changed | {file.name for file in old})
