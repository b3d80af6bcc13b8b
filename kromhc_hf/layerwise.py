"""The path at which this class was first used; it is written in `conversion/layerwise.py`."""

from .conversion.layerwise import LayerwiseModel


__all__ = ["LayerwiseModel"]
