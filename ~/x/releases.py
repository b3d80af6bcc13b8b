# Code of kromhc-hf, which travels with every model that it saves.
"""Which releases of transformers will do, and which model types the installed one has; torch is not imported for it."""

import functools
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import transformers


# The oldest release that has what is used here, and the newest one that the tests have seen; docs/hosts.md.
OLDEST, NEWEST = (5, 6), (5, 24)
# Where a release names its model types.
MAPPINGS = "transformers.models.auto.auto_mappings"


def release() -> tuple[int, int]:
    """The installed release of transformers, without the part that counts corrections."""
    major, minor = transformers.__version__.split(".")[:2]
    return int(major), int(minor)


def numbered(number: tuple[int, int]) -> str:
    """(5, 6) -> "5.6"."""
    return ".".join(map(str, number))


if release() < OLDEST:
    # Said here, in front of what older releases lack.
    raise ImportError(
        f"hyper-connections need transformers {numbered(OLDEST)} or newer; got {transformers.__version__}. "
        f'Install it: pip install "transformers>={numbered(OLDEST)}".'
    )


def has_family(model_type: str) -> bool:
    """Whether the installed release has a model type."""
    module = sys.modules.get(MAPPINGS)
    return model_type in (_mappings_file() if module is None else vars(module))["CONFIG_MAPPING_NAMES"]


@functools.cache
def _mappings_file() -> dict[str, Any]:
    """What the module defines, without its package, whose import looks through the folders of all families."""
    return runpy.run_path(str(Path(transformers.__file__).parents[1].joinpath(*MAPPINGS.split("."))) + ".py")


def warn_if_untested() -> None:
    """Says once that the installed release is newer than the tests have seen; what it does otherwise is refused."""
    if release() > NEWEST:
        warnings.warn(
            f"kromhc-hf is tested with transformers {numbered(OLDEST)} to {numbered(NEWEST)}; got "
            f"{transformers.__version__}. Every layer is checked before it is changed, and what is not understood is "
            "refused.",
            stacklevel=3,
        )
