"""Makes the Auto classes of transformers know every family, without importing any of them.

Only the installed package registers itself; copies of the modelling files on the Hub do not.
"""

from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

from .modeling.configuration_kromhc import PREFIX, KromHCConfig
from .modeling.layer_fit import known_model_types
from .modeling.modeling_kromhc import FACES, model_class
from .whole_models import guard_saving


# What makes the inputs of a model.
PREPARATION: tuple[Any, ...] = (
    TOKENIZER_MAPPING_NAMES,
    PROCESSOR_MAPPING_NAMES,
    IMAGE_PROCESSOR_MAPPING_NAMES,
    VIDEO_PROCESSOR_MAPPING_NAMES,
    FEATURE_EXTRACTOR_MAPPING_NAMES,
)


def register() -> None:
    """Registers all supported families with the Auto classes, and guards saving."""
    for model_type in known_model_types():
        # Not AutoConfig.register: it needs the class, and the class needs the family's module.
        face: Any = KromHCConfig
        CONFIG_MAPPING.register(PREFIX + model_type, face, exist_ok=True)
        for names in PREPARATION:
            if model_type in names:
                names[PREFIX + model_type] = names[model_type]
    KromHCConfig.on_new_class.append(_register_models)
    guard_saving()


def _register_models(config_type: type[KromHCConfig]) -> None:
    for face in FACES:
        backbone = face.backbone_for(config_type)
        if backbone is not None:
            cls = model_class(backbone, config_type)
            face.auto_class.register(config_type, cls, exist_ok=True)
            # By the name in config.json vLLM, SGLang, TRL and `transformers serve` look for it in the module. While it
            # is imported, transformers makes the module twice, and a tool may hold either; the class is the same.
            setattr(type(transformers), cls.__name__, cls)
