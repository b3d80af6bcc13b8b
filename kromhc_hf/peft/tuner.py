"""Hyper-connections as a PEFT method: a plain base model, and an adapter that holds their tensors and nothing else.

Imported when peft is (see peft_registration.py), and makes itself known to it then.
"""

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper, register_peft_method
from torch import nn

from ..applying import has_hyper_connections
from ..carried_row import row_to_carry, with_carried_row
from ..conversion.files import ADAPTER_TYPE
from ..modeling.connection_plan import ConnectionPlan, find_decoder, present_plan
from ..modeling.decoder_layer import new_connections
from ..row_contradiction import check_against_source
from .config import KromHCPeftConfig, peft_type
from .layer import (
    TENSOR_PREFIX,
    AdaptedLayer,
    StreamSite,
    adapt_layer,
    adapt_owners,
    refuse_merge,
    restore_layer,
    restore_owners,
)
from .left_out import warn_of_streams_left_out


def register_method() -> None:
    """Makes the method known to PEFT, once, and has two silent losses told.

    Adapters with trained hyper-connections are refused by plain bases, and a warning is given where an adapter is saved
    without those of its base.
    """
    if peft_type() in PEFT_TYPE_TO_TUNER_MAPPING:
        return
    register_peft_method(
        name=ADAPTER_TYPE.lower(), config_cls=KromHCPeftConfig, model_cls=HyperConnectionTuner, prefix=TENSOR_PREFIX
    )
    present_check = BaseTuner._check_new_adapter_config

    # PEFT drops the tensors of modules_to_save in silence where the model has no such modules.
    @functools.wraps(present_check)
    def check(self: BaseTuner, config: PeftConfig) -> None:
        check_modules_to_save(self.model, config)
        present_check(self, config)

    BaseTuner._check_new_adapter_config = check  # type: ignore[method-assign]
    present_save = PeftModel.save_pretrained

    @functools.wraps(present_save)
    def save(self: PeftModel, *args: Any, **kwargs: Any) -> None:
        warn_of_streams_left_out(self, plain_base(self))
        present_save(self, *args, **kwargs)

    PeftModel.save_pretrained = save  # type: ignore[method-assign]


def check_modules_to_save(model: nn.Module, config: PeftConfig) -> None:
    """Refuses an adapter that trains hyper-connections on a model without them.

    Raises:
        ValueError: naming the modules that the adapter asks for and those that the model has.
    """
    # By the ending alone: a row from outside names its steps itself, and may not be known here.
    wanted = {name for name in getattr(config, "modules_to_save", None) or () if name.endswith("_hc")}
    paths = [path for path, _ in model.named_modules() if path.endswith("_hc")]
    if wanted and not any(path.endswith(name) for path in paths for name in wanted):
        present = sorted({path.rpartition(".")[2] for path in paths})
        raise ValueError(
            f"The adapter has modules_to_save={sorted(wanted)}, so it must be loaded on a model with these "
            f"hyper-connections; {type(model).__name__} has "
            f"{', '.join(present) or 'none'}. Load "
            f"{config.base_model_name_or_path or 'the model with hyper-connections that it was made for'} as its base."
        )


def plan_adapter(model: Any, config: KromHCPeftConfig) -> tuple[ConnectionPlan, dict[str, Any]]:
    """Where the hyper-connections of an adapter go, and what its configuration says about the base from then on.

    Raises:
        ValueError: if the family is not supported, the model has hyper-connections of its own, or the adapter was made
            for another base.
    """
    with with_carried_row(model.config.model_type, config.base_family, "base_family of the adapter"):
        return _plan_adapter(model, config)


def _plan_adapter(model: Any, config: KromHCPeftConfig) -> tuple[ConnectionPlan, dict[str, Any]]:
    plan = None if has_hyper_connections(model) else present_plan(find_decoder(model))
    if plan is None or not all(isinstance(layer, AdaptedLayer) for layer in plan.decoder.connected):
        raise ValueError(
            f"The base of a KromHCPeftConfig must be a plain model; {type(model).__name__} has hyper-connections of "
            'its own. Train those: freeze_backbone(model), or LoraConfig(..., modules_to_save=["attn_hc", "ffn_hc"]).'
        )
    plan = present_plan(find_decoder(model))
    check_against_source(plan)
    base_config = plan.decoder.owners[-1].config
    actual = {
        "base_model_type": model.config.model_type,
        "base_hidden_size": base_config.hidden_size,
        "base_num_layers": len(plan.decoder.layers),
    }
    made_for = {name: getattr(config, name) for name in actual}
    if any(value not in (None, actual[name]) for name, value in made_for.items()):
        raise ValueError(
            f"The adapter must be loaded on the base model that it was made for, {made_for}; got "
            f"{type(model).__name__} with {actual}. Load {config.base_model_name_or_path or 'that base model'} first."
        )
    layers = config.stream_options().in_model(base_config.num_hidden_layers).layers
    return plan, {**actual, "base_family": row_to_carry(model.config), "layers": layers}


class HyperConnectionTuner(BaseTuner):
    """Adds the adapters of `KromHCPeftConfig` to a base model, which may have adapters of other methods already."""

    prefix = TENSOR_PREFIX
    tuner_layer_cls = StreamSite
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adds one adapter.

        Raises:
            ValueError: see `plan_adapter`; the model is then what it was.
        """
        base = plain_base(model)
        config: Any = self.peft_config[adapter_name]
        self._plan, made_for = plan_adapter(base, config)
        vars(config).update(made_for)
        path = next(path for path, module in model.named_modules() if module is self._plan.decoder.layers)
        layers = r"\d+" if config.layers is None else "|".join(map(str, range(*config.layers)))
        config.target_modules = rf"{re.escape(path)}\.({layers})"
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        adapt_owners(self._plan.decoder)
        # All methods on a base share one dict, which may be the base's, and goes when another method is unloaded.
        vars(self)["peft_config"] = self.peft_config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        position, options = int(target_name), peft_config.stream_options()
        spec, backbone_config = self._plan.specs[position], self._plan.decoder.owners[-1].config
        connections = new_connections(target, spec, options, backbone_config, position)
        if not isinstance(target, AdaptedLayer):
            adapt_layer(target, spec)
        for name, module in connections.items():
            if module is not None:
                if getattr(target, name) is None:
                    target.register_module(name, StreamSite())
                getattr(target, name).add(adapter_name, module, options)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuses what PEFT takes beside the arguments of the model, and would drop.

        Raises:
            ValueError: naming the argument.
        """
        for name in ("adapter_names", "alora_offsets"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name} must not be given with an adapter of hyper-connections, which has one set of streams for "
                    f"the whole batch; got {kwargs[name]!r}. Run the rows of each adapter by themselves, after "
                    "set_adapter(...)."
                )
        yield

    def _check_merge_allowed(self) -> None:
        refuse_merge()

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        """Takes the adapters of this method off: the base is what it was, other methods on it stay.

        Unlike PEFT's methods, also where modules_to_save were trained: those that they stand in for come back.
        """
        if merge:
            refuse_merge()
        shared, self.peft_config = self.peft_config, dict(self.peft_config)
        own = {name for name, config in shared.items() if isinstance(config, KromHCPeftConfig)}
        put_back(self.model, own)
        # Those that are there now; some may be copies.
        layers = [module for module in self.model.modules() if isinstance(module, AdaptedLayer)]
        for layer in layers:
            restore_layer(layer)
        if layers:
            restore_owners(self._plan.decoder)
        if shared.keys() - own:
            for name in own:
                del shared[name]
        # A PeftModel of another method has a property of this name.
        elif "peft_config" in vars(self.model):
            del self.model.peft_config
        return self.model


def plain_base(model: Any) -> Any:
    """The transformers model inside a PeftModel, or inside several around each other."""
    while isinstance(model, PeftModel):
        model = model.get_base_model()
    return model


def put_back(model: nn.Module, adapters: set[str]) -> None:
    """Drops what adapters hold in modules_to_save; a module that no other adapter holds is again the model's own."""
    # What is inside comes first.
    for path, wrapper in reversed(list(model.named_modules())):
        if not isinstance(wrapper, ModulesToSaveWrapper) or adapters.isdisjoint(wrapper.modules_to_save):
            continue
        others = [name for name in wrapper.modules_to_save if name not in adapters]
        for name in adapters & wrapper.modules_to_save.keys():
            active = [other for other in wrapper.active_adapters if other not in adapters] or others[:1]
            wrapper.delete_adapter(name, active if wrapper.active_adapters else None)
        if not others:
            parent, _, own = path.rpartition(".")
            setattr(model.get_submodule(parent), own, wrapper.original_module)
