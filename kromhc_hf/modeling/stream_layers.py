# Code of kromhc-hf, which travels with every model that it saves.
"""Which decoder layers have streams: a range without gaps, given by its ends as in a slice of Python."""

import re
from typing import Any


# First position and the one behind the last; negative ones count from the end, None is an end of the model.
Ends = tuple[int | None, int | None]
SLICE = re.compile(r"(-?\d+)?:(-?\d+)?")


def read_ends(value: Any) -> Ends | None:
    """The ends of a range of layers in one form; None for all layers.

    Args:
        value: None or "all", a tuple or list of two numbers or None, or a slice as text, such as "8:12" or "-4:".

    Raises:
        ValueError: if it is nothing of that.
    """
    ends = value
    if isinstance(value, str):
        match = SLICE.fullmatch(value)
        ends = (None, None) if value == "all" else match and tuple(part and int(part) for part in match.groups())
    elif value is None:
        ends = (None, None)
    known = isinstance(ends, tuple | list) and len(ends) == 2
    if not known or any(isinstance(end, bool) or not isinstance(end, int | None) for end in ends):
        raise ValueError(
            f"layers must be None for all decoder layers, or a range (start, stop) of them as in a slice of Python, "
            f"such as (8, 12), '8:12' or '-4:'; got {value!r}. Leave layers out for all of them."
        )
    return None if ends[0] is None and ends[1] is None else (ends[0], ends[1])


def positions(ends: Ends | None, number: int) -> range:
    """The layers in a model of so many decoder layers.

    Raises:
        ValueError: if there are none, or the model does not have all of them.
    """
    start, stop = (None, None) if ends is None else ends
    first = 0 if start is None else start + number * (start < 0)
    behind = number if stop is None else stop + number * (stop < 0)
    if not 0 <= first < behind <= number:
        raise ValueError(
            f"layers must be a range of at least one of the {number} decoder layers of the model, which are numbered "
            f"from 0 to {number - 1}; got {ends!r}. Use for example layers='{number - -(-number // 3)}:{number}', the "
            "last third."
        )
    return range(first, behind)


def in_words(ends: tuple[int, int]) -> str:
    """Two positions in a model as people say it: (8, 12) -> "8 to 11"."""
    first, behind = ends
    return f"{first}" if behind == first + 1 else f"{first} to {behind - 1}"
