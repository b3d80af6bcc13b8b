"""Makes Liger apply a family's kernels to its models with hyper-connections, as soon as Liger is imported."""

import importlib

from .after_import import after_import
from .modeling.model_types import PREFIX, known_model_types


MODULE = "liger_kernel.transformers.monkey_patch"


def register_with_liger() -> None:
    """Has Liger know every family that it has kernels for under `kromhc_<family>` too, now or when it is imported.

    Its functions take a model by its class and patch the norms and feed-forwards of its decoder layers, which are the
    family's own here as well. Without this it would patch nothing, in silence.
    """
    after_import(MODULE, _register)


def _register() -> None:
    functions = getattr(importlib.import_module(MODULE), "MODEL_TYPE_TO_APPLY_LIGER_FN", {})
    for model_type in known_model_types():
        if model_type in functions:
            functions.setdefault(PREFIX + model_type, functions[model_type])
