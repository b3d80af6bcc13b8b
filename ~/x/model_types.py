# Code of kromhc-hf, which travels with every model that it saves.
"""The model types that can be given hyper-connections; torch is not imported to list them."""

from .families import COMPOSITE, ROWS, SUPPORTED
from .releases import has_family


# In front of the model type of a base, it is that of the model with hyper-connections.
PREFIX = "kromhc_"


def supported_model_types() -> tuple[str, ...]:
    """The model types of `AutoModelForCausalLM` in the installed transformers that can be given hyper-connections.

    In alphabetical order.
    """
    return tuple(sorted(filter(has_family, SUPPORTED)))


def composite_model_types() -> tuple[str, ...]:
    """The model types of several modalities in the installed transformers that can be given hyper-connections.

    In alphabetical order.
    """
    return tuple(sorted(filter(has_family, COMPOSITE)))


def known_model_types() -> tuple[str, ...]:
    """Every model type that has a configuration with hyper-connections: also text models that are parts of others."""
    return tuple(sorted(filter(has_family, {*ROWS, *COMPOSITE})))
