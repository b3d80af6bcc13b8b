"""Manifold-constrained hyper-connections for the causal language models of Hugging Face transformers."""

from .architectures import supported_model_types
from .configuration import KromHCConfig
from .growing import grow_streams
from .hyper_connection import HyperConnection, Mappings
from .mixing import doubly_stochastic_error
from .modeling import KromHCForCausalLM, KromHCForSequenceClassification, KromHCModel
from .parameter_counts import count_parameters
from .patching import apply_hyper_connections, has_hyper_connections, remove_hyper_connections
from .reference import import_reference_state_dict
from .reference_model import import_reference_checkpoint
from .registration import register


__version__ = "0.1.0"

__all__ = [
    "HyperConnection",
    "KromHCConfig",
    "KromHCForCausalLM",
    "KromHCForSequenceClassification",
    "KromHCModel",
    "Mappings",
    "apply_hyper_connections",
    "count_parameters",
    "doubly_stochastic_error",
    "grow_streams",
    "has_hyper_connections",
    "import_reference_checkpoint",
    "import_reference_state_dict",
    "remove_hyper_connections",
    "supported_model_types",
]

register()
