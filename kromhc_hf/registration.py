"""Makes the Auto classes of transformers know every family, without importing any of them.

Only the installed package registers itself; copies of the modelling files on the Hub do not.
"""

from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from .modeling.configuration_kromhc import PREFIX, KromHCConfig
from .modeling.layer_fit import supported_model_types
from .modeling.modeling_kromhc import FACES, model_class
from .whole_models import guard_saving


def register() -> None:
    """Registers all supported families with AutoConfig, AutoTokenizer and the AutoModel classes, and guards saving."""
    for model_type in supported_model_types():
        # Not AutoConfig.register: it needs the class, and the class needs the family's module.
        face: Any = KromHCConfig
        CONFIG_MAPPING.register(PREFIX + model_type, face, exist_ok=True)
        if model_type in TOKENIZER_MAPPING_NAMES:
            TOKENIZER_MAPPING_NAMES[PREFIX + model_type] = TOKENIZER_MAPPING_NAMES[model_type]
    KromHCConfig.on_new_class.append(_register_models)
    guard_saving()


def _register_models(config_type: type[KromHCConfig]) -> None:
    for face in FACES:
        backbone = face.backbone_for(config_type)
        if backbone is not None:
            face.auto_class.register(config_type, model_class(backbone, config_type), exist_ok=True)
