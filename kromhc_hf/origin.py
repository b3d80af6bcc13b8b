"""Where a base checkpoint comes from: its Hub id, revision and licence, for the model card of what is made of it."""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from .checkpoint import CARD


# How huggingface_hub lays out its cache: models--ORG--NAME/snapshots/COMMIT.
CACHE_FOLDER = re.compile(r"models--(?P<id>[^/]+)")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")
LICENSE_FIELDS = ("license", "license_name", "license_link")


def origin_of(source: str | os.PathLike[str], folder: Path, base_model: str | None = None) -> dict[str, Any]:
    """What is known about a base: `base_model` and `base_revision` if it is on the Hub, and its `license` fields.

    Args:
        source: as the user gave it, a folder or a Hub id.
        folder: where it is.
        base_model: its Hub id, if the user said so.

    Raises:
        ValueError: if `base_model` is not a Hub id.
    """
    if base_model is not None and not HUB_ID.fullmatch(base_model):
        raise ValueError(f"base_model must be a Hub id such as 'ORG/NAME'; got {base_model!r}.")
    snapshot = folder.resolve()
    in_cache = CACHE_FOLDER.fullmatch(snapshot.parents[1].name) if len(snapshot.parents) > 1 else None
    origin: dict[str, Any] = {}
    if in_cache and snapshot.parent.name == "snapshots":
        origin = {"base_model": in_cache["id"].replace("--", "/"), "base_revision": snapshot.name}
    if base_model is not None and base_model != origin.get("base_model"):
        origin = {"base_model": base_model}
    license = {name: value for name, value in _card_metadata(folder).items() if name in LICENSE_FIELDS and value}
    return {**origin, "license": license} if license else origin


def _card_metadata(folder: Path) -> dict[str, Any]:
    """The metadata at the top of a model card; empty where there is none that can be read."""
    path = folder / CARD
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    try:
        metadata = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return metadata if isinstance(metadata, dict) else {}
