"""Manifold-constrained hyper-connections for the causal language models of Hugging Face transformers."""

from importlib import import_module
from typing import Any

from .architectures import supported_model_types
from .configuration import KromHCConfig
from .connections_only import load_hyper_connections, push_hyper_connections, save_hyper_connections
from .conversion import convert_checkpoint
from .hub import push_folder
from .hyper_connection import HyperConnection, Mappings
from .inspection import record_mappings
from .mixing import doubly_stochastic_error
from .modeling import KromHCForCausalLM, KromHCForSequenceClassification, KromHCModel
from .patching import apply_hyper_connections, has_hyper_connections, remove_hyper_connections
from .reference import import_reference_state_dict
from .registration import register
from .training import (
    HyperConnectionTrainerMixin,
    freeze_backbone,
    hyper_connection_state_dict,
    optimizer_param_groups,
)
from .verification import ConversionReport, verify_conversion


__version__ = "0.1.0"

__all__ = [
    "ConversionReport",
    "HyperConnection",
    "HyperConnectionTrainerMixin",
    "KromHCConfig",
    "KromHCForCausalLM",
    "KromHCForSequenceClassification",
    "KromHCModel",
    "Mappings",
    "StreamMetricsCallback",
    "apply_hyper_connections",
    "convert_checkpoint",
    "doubly_stochastic_error",
    "freeze_backbone",
    "has_hyper_connections",
    "hyper_connection_state_dict",
    "import_reference_state_dict",
    "load_hyper_connections",
    "optimizer_param_groups",
    "push_folder",
    "push_hyper_connections",
    "record_mappings",
    "remove_hyper_connections",
    "save_hyper_connections",
    "supported_model_types",
    "verify_conversion",
]

# Trainer and PEFT take seconds to import, and PEFT is optional.
_ON_DEMAND = {"StreamMetricsCallback": ".metrics"}


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        return getattr(import_module(_ON_DEMAND[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register()
