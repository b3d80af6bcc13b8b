"""Checkpoints in folders and on the Hub: converted, verified, uploaded."""

from .convert import convert_checkpoint
from .report import ConversionReport
from .verification import verify_conversion


__all__ = ["ConversionReport", "convert_checkpoint", "verify_conversion"]
