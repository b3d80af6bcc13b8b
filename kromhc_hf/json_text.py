"""JSON that every reader takes; torch is not imported."""

import json
from math import isfinite
from typing import Any


def finite(value: Any) -> Any:
    """The same with None for numbers that are not finite, which JSON has no words for."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def json_text(value: Any, indent: int | None = 2) -> str:
    """The JSON of a value; numbers that are not finite are null."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)
