"""Hyper-connections on a live model: apply, has, remove."""

from typing import TYPE_CHECKING, Any

from transformers.modeling_utils import PreTrainedModel

from .modeling.composite import replace_config
from .modeling.configuration_kromhc import KromHCConfig
from .modeling.connection_plan import find_decoder, plan_connections
from .modeling.decoder_layer import HyperConnectedLayer
from .modeling.installation import install, uninstall
from .modeling.layer_fit import check_own_forward
from .modeling.modeling_kromhc import HyperConnectedModel, model_class
from .modeling.options import StreamKeywords, StreamOptions, given_options, show_options
from .modeling.outside_families import bind_model
from .row_contradiction import check_against_source
from .whole_models import check_not_a_part, check_whole


if TYPE_CHECKING:
    from typing import Unpack


@show_options(StreamKeywords)
def apply_hyper_connections(model: Any, *positional: Any, **options: "Unpack[StreamKeywords]") -> Any:
    """Gives a loaded transformers model n residual streams, in place; with init "identity" its output stays the same.

    Everything is checked first: when this raises, the model is what it was. The base parameters keep their names.

    Args:
        model: a model of transformers whose family is supported.
        **options: of the hyper-connections, see `StreamOptions`.

    Returns:
        The same model object, now of the class with hyper-connections.

    Raises:
        ValueError: if the model already has hyper-connections or is a part of another, its family is not supported, or
            an option is wrong.
    """
    stream_options = StreamOptions(**given_options(positional, options))
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model must be a transformers model; got {type(model).__name__}. "
            "Apply hyper-connections before wrapping the model (PEFT, torch.compile, FSDP)."
        )
    if has_hyper_connections(model):
        raise ValueError(
            f"{type(model).__name__} already has hyper-connections with num_streams={model.config.hc_num_streams}. "
            "Call remove_hyper_connections(model) first."
        )
    check_whole(model)
    plan = plan_connections(model)
    check_against_source(plan)
    # By the names that options have here, before the configuration says it by its own.
    stream_options = stream_options.in_model(plan.decoder.owners[-1].config.num_hidden_layers)
    bind_model(model)
    config = KromHCConfig(backbone_config=model.config, **stream_options.as_fields())
    replace_config(model, config)
    install(plan, model_class)
    return model


def has_hyper_connections(model: Any) -> bool:
    """Whether a model has hyper-connections."""
    return isinstance(model, HyperConnectedModel)


def remove_hyper_connections(model: Any) -> Any:
    """Undoes `apply_hyper_connections`, in place: original classes, configuration and state-dict keys.

    What training has changed in the base parameters stays; what the hyper-connections learned is dropped.

    Returns:
        The same model object, now of the family's own class.

    Raises:
        ValueError: if the model has no hyper-connections, or is a part of another one that has them.
    """
    if not has_hyper_connections(model):
        raise ValueError(f"model must have hyper-connections to remove; got {type(model).__name__} without them.")
    check_not_a_part(model, "removed from", "remove_hyper_connections")
    decoder = find_decoder(model)
    for position, layer in enumerate(decoder.layers):
        check_own_forward(layer, position)
        if model.config.hc_layers is None and not isinstance(layer, HyperConnectedLayer):
            raise ValueError(
                f"every decoder layer must have hyper-connections to remove; got layer {position} "
                f"({type(layer).__name__}) without. Put the layer back that had them, or reload the model."
            )
    replace_config(model, model.config.to_backbone_config())
    uninstall(decoder)
    return model
