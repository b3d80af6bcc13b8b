from . import rows
from .applying import apply_hyper_connections, has_hyper_connections, remove_hyper_connections
from .conversion.code_update import update_code
from .conversion.convert import convert_checkpoint
from .conversion.hub import push_checkpoint, push_folder
from .conversion.hyper_connection_file import load_hyper_connections, push_hyper_connections, save_hyper_connections
from .conversion.report import ConversionReport
from .conversion.verification import verify_conversion
from .derivation import derive_family
from .growing import Growth, grow_streams
from .inspection.inspection import inspect_checkpoints, inspect_model
from .inspection.recording import BranchRecord, record_mappings
from .inspection.report import write_report
from .inspection.trainer_callback import StreamMetricsCallback
from .modeling.configuration_kromhc import KromHCConfig
from .modeling.hyper_connection import HyperConnection, Mappings
from .modeling.mixing import doubly_stochastic_error
from .modeling.model_types import composite_model_types, supported_model_types
from .modeling.modeling_kromhc import (
    KromHCForCausalLM,
    KromHCForImageTextToText,
    KromHCForMultimodalLM,
    KromHCForQuestionAnswering,
    KromHCForSequenceClassification,
    KromHCForTokenClassification,
    KromHCModel,
)
from .modeling.options import StreamOptions
from .modeling.stream_ends import expand, mean_of_streams
from .official.checkpoints import import_reference_checkpoint
from .official.modules import import_reference_state_dict
from .own_families import register_family, unregister_family
from .parameter_counts import count_parameters
from .peft.config import KromHCPeftConfig
from .peft.conversion import adapter_to_model, model_to_adapter
from .training import (
    HyperConnectionTrainerMixin,
    freeze_backbone,
    hyper_connection_state_dict,
    load_hyper_connection_state_dict,
    optimizer_param_groups,
    shard_hyper_connections,
)

__version__: str

__all__ = [
    "BranchRecord",
    "ConversionReport",
    "Growth",
    "HyperConnection",
    "HyperConnectionTrainerMixin",
    "KromHCConfig",
    "KromHCForCausalLM",
    "KromHCForImageTextToText",
    "KromHCForMultimodalLM",
    "KromHCForQuestionAnswering",
    "KromHCForSequenceClassification",
    "KromHCForTokenClassification",
    "KromHCModel",
    "KromHCPeftConfig",
    "Mappings",
    "StreamMetricsCallback",
    "StreamOptions",
    "adapter_to_model",
    "apply_hyper_connections",
    "composite_model_types",
    "convert_checkpoint",
    "count_parameters",
    "derive_family",
    "doubly_stochastic_error",
    "expand",
    "freeze_backbone",
    "grow_streams",
    "has_hyper_connections",
    "hyper_connection_state_dict",
    "import_reference_checkpoint",
    "import_reference_state_dict",
    "inspect_checkpoints",
    "inspect_model",
    "load_hyper_connection_state_dict",
    "load_hyper_connections",
    "mean_of_streams",
    "model_to_adapter",
    "optimizer_param_groups",
    "push_checkpoint",
    "push_folder",
    "push_hyper_connections",
    "record_mappings",
    "register_family",
    "remove_hyper_connections",
    "rows",
    "save_hyper_connections",
    "shard_hyper_connections",
    "supported_model_types",
    "unregister_family",
    "update_code",
    "verify_conversion",
    "write_report",
]
