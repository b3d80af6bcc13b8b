"""Checkpoints in folders and on the Hub: converted, verified, uploaded."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "convert": ["convert_checkpoint"],
        "report": ["ConversionReport"],
        "verification": ["verify_conversion"],
    },
)
