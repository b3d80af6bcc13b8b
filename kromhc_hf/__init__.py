"""Manifold-constrained hyper-connections for the language models of Hugging Face transformers.

What it has is named in `__init__.pyi` and imported when somebody asks for it. Importing the package has its models
registered with the Auto classes, PEFT and Liger where these are imported: neither they nor torch are imported for that.
"""

from importlib.util import find_spec
from typing import Any

import lazy_loader

from .liger_kernels import register_with_liger
from .modeling.releases import warn_if_untested
from .peft_registration import register_with_peft
from .registration import register


__version__ = "0.1.0"

_exported, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
_NEEDS_PEFT = ("KromHCPeftConfig", "adapter_to_model", "model_to_adapter")


def __getattr__(name: str) -> Any:
    if name in _NEEDS_PEFT:
        if find_spec("peft") is None:
            raise ImportError(f"{name} needs the package peft, which is not installed: pip install 'kromhc-hf[peft]'.")
    return _exported(name)


warn_if_untested()
register()
register_with_peft()
register_with_liger()
