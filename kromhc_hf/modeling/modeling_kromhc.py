# Code of kromhc-hf, which travels with every model that it saves.
"""KromHCForCausalLM and its siblings: a family's own model classes, with hyper-connections in their decoder layers.

It is longer than other files because it names all of them, since some releases of transformers bring no others along,
and because the classes for the tasks and those that are generated from them make each other.

The way from config.json to a running model:
1. `"model_type": "kromhc_llama"` leads AutoConfig to `KromHCLlamaConfig`, a LlamaConfig with the options beside its own
   fields (configuration_kromhc.py, options.py); without the package, `auto_map` leads to a copy of this file.
2. The Auto class asks for `KromHCLlamaForCausalLM(KromHCForCausalLM, LlamaForCausalLM)`, which `model_class` generates.
3. Its `__init__` has the family build its own model. `find_decoder` finds the decoder layers, and `check_layers` holds
   each against the row of the family (connection_plan.py, layer_fit.py, families.py in the words of layer_spec.py).
4. Of a model of several modalities these are the layers of its text model (composite.py). layer_loop.py reads what the
   model does between them.
5. `install` gives layers and models their classes with hyper-connections (installation.py, decoder_layer.py).
6. transformers fills in the weights: the family's under their own names, ours from a checkpoint or `_init_weights`.
7. In a forward the first layer makes streams, every branch reads and writes them through kernels.py, and the last layer
   reads them out (stream_ends.py); model_forward.py does that for the hidden states that are recorded on the way.
"""

import functools
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

# In front of the others, since it says which releases of transformers will do.
from .host import (
    class_for_task,
    class_names_for_task,
    config_class_name,
    known_to,
    mirror_activation_scales,
    mirror_weight_conversion,
    name_for_task,
    record_outputs_of,
    weights_of_this_save,
    why_absent,
)


# isort: split
from .arrangement import check_complete, check_one_stage
from .configuration_kromhc import KromHCConfig, config_class, config_class_named, outside_config_class
from .connection_plan import check_layers, find_decoder
from .installation import connect_owners, install
from .layer_loop import methods_for_streams
from .layer_spec import attribute
from .model_forward import with_readout
from .model_types import known_model_types
from .outside_families import BOUND, OutsideFamily, bind
from .remote_code import Shareable, class_name
from .stream_module import StreamModule


# What the files above import. Early releases (5.6) take along, from a folder, what this one names and nothing else.
if TYPE_CHECKING:
    from .composite import replace_config  # noqa: F401
    from .decoder_layer import PLACE_NAMES  # noqa: F401
    from .families import ATTENTION  # noqa: F401
    from .foreign_code import CODE_FIELDS  # noqa: F401
    from .generators import GENERATORS  # noqa: F401
    from .hyper_connection import Mappings  # noqa: F401
    from .kernels import KERNELS  # noqa: F401
    from .kernels_check import TOKENS  # noqa: F401
    from .kernels_compiled import Project  # noqa: F401
    from .kernels_connect import COMPOSITE  # noqa: F401
    from .kernels_eager import FEW_TOKENS  # noqa: F401
    from .kernels_eager_passes import SPAN_ELEMENTS  # noqa: F401
    from .kernels_triton import read  # noqa: F401
    from .kernels_triton_gradients import SHARE  # noqa: F401
    from .kernels_triton_language import AVAILABLE  # noqa: F401
    from .kernels_triton_projection import gates  # noqa: F401
    from .kernels_triton_width import Width  # noqa: F401
    from .known_values import number  # noqa: F401
    from .layer_fit import check_model_type  # noqa: F401
    from .layer_returns import Beside  # noqa: F401
    from .layer_source import own_path  # noqa: F401
    from .mixing import PAPER_RESIDUAL_LOGIT  # noqa: F401
    from .model_card import MARK  # noqa: F401
    from .option_table import INITS  # noqa: F401
    from .options import given_options  # noqa: F401
    from .outside_code import FAMILY_MODULE  # noqa: F401
    from .read_gate import gated_part  # noqa: F401
    from .recomputation import Origin  # noqa: F401
    from .releases import OLDEST  # noqa: F401
    from .stream_blocks import read_recompute  # noqa: F401
    from .stream_ends import expand  # noqa: F401
    from .stream_layers import Ends  # noqa: F401
    from .variants import VARIANTS  # noqa: F401
    from .variants_permutations import LARGEST_FACTOR  # noqa: F401
    from .variants_rotations import cayley  # noqa: F401


FROM_SCRATCH = (
    "hc_init='identity' is for pretrained weights, which it leaves as they are; these are random. From scratch it "
    "was not told apart from the plain residual, and hc_init='paper' was ahead of both (docs/evidence.md). Use "
    "hc_init='paper'."
)


class HyperConnectedModel(Shareable):
    """Mixed in front of every transformers model class between the root and the decoder layers."""

    backbone_class: ClassVar[type[PreTrainedModel]]
    config_class: ClassVar[type[KromHCConfig]]
    auto_class: ClassVar[Any] = None
    # From the model that holds the decoder layers to them; None in the models around it.
    hc_layers_path: str | None = None
    # Of the model that holds the decoder layers: whether its weights are those that its constructor drew.
    hc_weights_are_random: bool = False

    def __new__(cls, config: Any = None, *args: Any, **kwargs: Any) -> "HyperConnectedModel":
        if not hasattr(cls, "backbone_class"):
            cls = cls.class_for(config)
        return super().__new__(cls)

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        config.validate_hyper_connections()
        # Heads build their base model, and models of several modalities their text model, through Auto classes, which
        # do not know a copy of this file on the Hub.
        with _known(type(config)), _known(type(config.get_text_config())):
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        decoder = find_decoder(self)
        # What is built through an Auto class is connected already, and so far it is the only one.
        if decoder.connected:
            connect_owners(decoder, model_class)
        else:
            install(check_layers(decoder), model_class)
        # `from_pretrained` constructs without memory, and fills in the weights afterwards.
        decoder.owners[-1].hc_weights_are_random = not any(p.is_meta for p in self.parameters())  # type: ignore[attr-defined]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.hc_weights_are_random = False
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]

    def train(self, mode: bool = True) -> Any:
        """Training mode, see `torch.nn.Module.train`; warns, once, where init "identity" meets random weights.

        Raises:
            ValueError: if decoder layers are empty, as those of other pipeline stages are. Servers call `eval` when
                they have loaded a model; at its first forward the other stages would already wait for this one.
        """
        if self.hc_layers_path is not None:
            check_one_stage(attribute(self, self.hc_layers_path))
        if mode and self.hc_weights_are_random:
            self.hc_weights_are_random = False
            options = self.config.stream_options()  # type: ignore[attr-defined]
            if options.init == "identity" and options.num_streams > 1:
                warnings.warn(FROM_SCRATCH, UserWarning, stacklevel=2)
        return super().train(mode)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # By what the class is generated from, as not every class has a name that an Auto class knows it by. A class
        # that was derived from it, by users or torch, goes by its own name.
        if "backbone_class" not in vars(type(self)):
            return super().__reduce_ex__(protocol)
        return _restored, (self.backbone_class, self.config_class), vars(self)

    @classmethod
    def class_for(cls, config: Any) -> type[Any]:
        """The generated class for a configuration.

        Raises:
            ValueError: if `config` is not a KromHCConfig, or the family has no model for this task.
        """
        if not isinstance(config, KromHCConfig):
            raise ValueError(
                f"{cls.__name__} needs a KromHCConfig; got {type(config).__name__}. "
                "Use KromHCConfig(backbone_config=...)."
            )
        return cls._class_for_type(type(config))

    @classmethod
    def _class_for_type(cls, config_type: type[KromHCConfig]) -> type[Any]:
        backbone = cls.backbone_for(config_type)
        if backbone is None:
            raise ValueError(
                f"{config_type.backbone_config_class.model_type} has no model for {cls.auto_class.__name__}."
            )
        return model_class(backbone, config_type)

    @classmethod
    def backbone_for(cls, config_type: type[KromHCConfig]) -> type[PreTrainedModel] | None:
        """The family's own class for the task of this face, if it has one."""
        return class_for_task(cls.auto_class, config_type.backbone_config_class)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Loads a checkpoint with hyper-connections; takes what `from_pretrained` of the Auto class takes.

        Raises:
            ValueError: if it has no hyper-connections, or the family has no model for this task.
            OSError: if it cannot be read.
        """
        # Of code in the repository, and what computes is the code of this class.
        kwargs.pop("code_revision", None)
        where = pretrained_model_name_or_path if config is None else config
        if hasattr(cls, "backbone_class"):
            return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)  # type: ignore[misc]
        if isinstance(config, PreTrainedConfig):
            found = cls.class_for(config)
        else:
            # Only the family is looked up here. Its class reads the configuration again, and knows better than any list
            # which keywords are of the Hub, of the configuration and of the model.
            try:
                found = cls._class_for_type(KromHCConfig.type_in(where, **kwargs))
            except (OSError, ValueError) as error:
                unknown = isinstance(error, ValueError) and kwargs.get("trust_remote_code")
                if config is not None or not (isinstance(error, OSError) or unknown):
                    raise
                # Without a configuration it may be an adapter, whose base the Auto class finds. A family from outside
                # comes with the folder, for those who trust it.
                loaded = cls.auto_class.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
                model = loaded[0] if isinstance(loaded, tuple) else loaded
                cls.class_for(model.config)
                return loaded
        return found.from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Saves the model, see `PreTrainedModel.save_pretrained`.

        Raises:
            ValueError: if its layers are not those that its configuration would make again.
        """
        decoder = find_decoder(self)
        check_complete(decoder.layers, decoder.owners[-1].config, decoder.candidates)
        if getattr(getattr(self, "hf_quantizer", None), "pre_quantized", False):
            # For what has been unpacked transformers has no way back, and asks for one with an error without words.
            kwargs.setdefault("save_original_format", False)
        with weights_of_this_save(Path(save_directory), kwargs.get("is_main_process", args[0] if args else True)):
            return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, StreamModule):
            module.reset_parameters()
        else:
            super()._init_weights(module)  # type: ignore[misc]

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Tensor and data parallelism as transformers does it; pipeline stages pass `[B, S, C]`, which streams are not.

        Raises:
            ValueError: for pipeline parallelism.
        """
        if getattr(distributed_config, "pp_size", None) not in (None, 1):
            raise ValueError(
                f"pp_size must be 1 for a model with hyper-connections, whose layers pass on [B, S, n, C] where "
                f"pipeline stages expect [B, S, C]; got {distributed_config.pp_size}. Use tp_size or fsdp_size."
            )
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)  # type: ignore[misc]

    # These look at the source file of the class, and it is the family's file that they are about. Custom code would
    # also skip weight conversions and part of the initialisation.
    @classmethod
    def is_custom_code(cls) -> bool:
        return cls.backbone_class.is_custom_code()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return cls.backbone_class._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls.backbone_class._can_set_experts_implementation()


class KromHCModel(HyperConnectedModel):
    """A base model with hyper-connections, for `AutoModel`."""

    auto_class = AutoModel


class KromHCForCausalLM(HyperConnectedModel):
    """A causal language model with hyper-connections: `KromHCForCausalLM(KromHCConfig(...))`.

    Constructing or loading it returns the class of the family, for example `KromHCLlamaForCausalLM`.

    Raises:
        ValueError: if the configuration is not a KromHCConfig.
    """

    auto_class = AutoModelForCausalLM


class KromHCForSequenceClassification(HyperConnectedModel):
    """A sequence classifier with hyper-connections, for `AutoModelForSequenceClassification`."""

    auto_class = AutoModelForSequenceClassification


class KromHCForTokenClassification(HyperConnectedModel):
    """A token classifier with hyper-connections, for `AutoModelForTokenClassification`."""

    auto_class = AutoModelForTokenClassification


class KromHCForQuestionAnswering(HyperConnectedModel):
    """A question answering model with hyper-connections, for `AutoModelForQuestionAnswering`."""

    auto_class = AutoModelForQuestionAnswering


class KromHCForImageTextToText(HyperConnectedModel):
    """A model of text and images with hyper-connections in its text model, for `AutoModelForImageTextToText`."""

    auto_class = AutoModelForImageTextToText


class KromHCForMultimodalLM(HyperConnectedModel):
    """A model of text and other modalities with hyper-connections in its text model, for `AutoModelForMultimodalLM`."""

    auto_class = AutoModelForMultimodalLM


# Those that continue a text. Some models of several modalities are causal language models to transformers as well.
GENERATIVE_FACES = (KromHCForImageTextToText, KromHCForMultimodalLM, KromHCForCausalLM)
FACES: tuple[type[HyperConnectedModel], ...] = (
    *GENERATIVE_FACES,
    KromHCForSequenceClassification,
    KromHCForTokenClassification,
    KromHCForQuestionAnswering,
    KromHCModel,
)


def model_class(backbone_class: Any, config_type: Any) -> type[Any]:
    """The class with hyper-connections for one of a family's model classes, `LlamaModel` -> `KromHCLlamaModel`.

    Several model types may share the class of one of them; each gets a class of its own, named after its configuration.
    """
    return _model_class(backbone_class, config_type)


@functools.cache
def _model_class(backbone_class: Any, config_type: Any) -> type[Any]:
    model_type, name = config_type.backbone_config_class.model_type, backbone_class.__name__
    faces = tuple(face for face in FACES if name in class_names_for_task(face.auto_class, model_type))
    new_name = class_name(backbone_class, config_type.backbone_config_class)
    namespace = {
        "__module__": __name__,
        "__qualname__": new_name,
        "__doc__": f"{name} with hyper-connections.",
        "config_class": config_type,
        "backbone_class": backbone_class,
        "_auto_class": None,
        "forward": with_readout(backbone_class.forward),
        **methods_for_streams(backbone_class),
    }
    for face in faces:
        name_for_task(face.auto_class, config_type.model_type, new_name)
    # Weight conversions are keyed by class name or by model type: each is mirrored under the same kind of key.
    mirror_weight_conversion(name, new_name)
    mirror_weight_conversion(model_type, config_type.model_type)
    mirror_activation_scales(model_type, config_type.model_type)
    return type(new_name, (*(faces or (HyperConnectedModel,)), backbone_class), namespace)


@contextmanager
def _known(config_type: Any) -> Iterator[None]:
    """Lets the Auto classes make a family's base and causal language model inside the block."""
    with ExitStack() as stack:
        for face in (KromHCModel, KromHCForCausalLM):
            backbone = face.backbone_for(config_type)
            stack.enter_context(known_to(face.auto_class, config_type, backbone and model_class(backbone, config_type)))
        yield


def family_in_folder(family: OutsideFamily, config_type: Any, models: dict[str, Any]) -> dict[str, Any]:
    """The classes with hyper-connections of a family whose code lies beside a saved model, by Auto class.

    Args:
        family: its row, as it was when the model was saved.
        config_type: its configuration class.
        models: its model classes, by Auto class.
    """
    bind(family, config_type, models)
    # By this they take their code along when the hyper-connections have been removed.
    for name, cls in {"AutoConfig": config_type, **models}.items():
        if cls.__module__.startswith("transformers_modules."):
            cls.register_for_auto_class(name)
    made = outside_config_class(family, config_type)
    return {"AutoConfig": made, **{name: model_class(backbone, made) for name, backbone in models.items()}}


def _restored(backbone_class: Any, config_type: Any) -> Any:
    """A pickled model, before its attributes come."""
    cls: Any = model_class(backbone_class, config_type)
    model = cls.__new__(cls)
    record_outputs_of(model)
    return model


def __getattr__(name: str) -> Any:
    # Pickle and `auto_map` look a generated class up by name. Configurations too: transformers makes a copy of the code
    # for every file that `auto_map` names, and there must be one alone.
    config_type: Any = config_class_named(name)
    if config_type is not None:
        return config_type
    plain = name.removeprefix("KromHC")
    for face in FACES if name.startswith("KromHC") else ():
        for model_type in known_model_types():
            stem = config_class_name(model_type).removesuffix("Config")
            if plain in class_names_for_task(face.auto_class, model_type) or plain.startswith(stem):
                config_type = config_class(model_type)
                backbone = face.backbone_for(config_type)
                if backbone is not None and class_name(backbone, config_type.backbone_config_class) == name:
                    return model_class(backbone, config_type)
    for bound in BOUND.values():
        for backbone in bound.models.values():
            if class_name(backbone, bound.config_class) == name:
                return model_class(backbone, outside_config_class(bound.family, bound.config_class))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}" + why_absent(name))
