"""From a PEFT adapter and its base to a full model with hyper-connections, and back."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..applying import apply_hyper_connections, has_hyper_connections
from ..carried_row import row_to_carry, with_carried_row
from ..conversion.base import BaseCheckpoint
from ..conversion.disk import new_folder, real_path
from ..conversion.files import ADAPTER_CONFIG, ADAPTER_TYPE, CARD, read_json
from ..conversion.loaded_base import auto_class_of, find_base
from ..conversion.stored_model import StoredModel
from ..inspection.recording import branches
from ..modeling.model_card import model_card
from ..modeling.model_types import PREFIX
from ..modeling.options import StreamOptions
from ..training import hyper_connection_state_dict, load_hyper_connection_state_dict
from ..whole_models import check_whole
from .config import KromHCPeftConfig
from .layer import TENSOR_PREFIX, StreamSite
from .tuner import HyperConnectionTuner, plain_base, plan_adapter


# How PEFT calls the tasks of the Auto classes. By its names for other heads it wants a copy of the head in the adapter.
TASK_TYPES = {
    "AutoModel": "FEATURE_EXTRACTION",
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForImageTextToText": "CAUSAL_LM",
    "AutoModelForMultimodalLM": "CAUSAL_LM",
}


# What PEFT puts around the keys of a tensor: in front of them all, and between the site and its adapter.
WRAPPER_PREFIX = "base_model.model."
SITE_PART = f".{TENSOR_PREFIX}adapters."


def model_keys(adapter_tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter file's tensors under the keys of a full model: `model.layers.0.attn_hc.bias`.

    Raises:
        ValueError: if a key is not one of hyper-connections.
    """
    for key in adapter_tensors:
        if not key.startswith(WRAPPER_PREFIX) or SITE_PART not in key:
            raise ValueError(
                f"An adapter of hyper-connections must hold keys like {WRAPPER_PREFIX}...attn_hc{SITE_PART}bias alone; "
                f"got {key!r}. Merge LoRA into the base; to train other modules too, "
                "begin with a full model: apply_hyper_connections(base)."
            )
    return {key.removeprefix(WRAPPER_PREFIX).replace(SITE_PART, "."): t for key, t in adapter_tensors.items()}


def adapter_keys(model_tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `model_keys`."""
    renamed = {}
    for key, tensor in model_tensors.items():
        site, _, name = key.rpartition(".")
        renamed[f"{WRAPPER_PREFIX}{site}{SITE_PART}{name}"] = tensor
    return renamed


def adapter_to_model(peft_model: Any, adapter_name: str | None = None) -> Any:
    """Turns a base with an adapter of hyper-connections into the full model, for `save_pretrained` or `generate`.

    The output stays bitwise the same. The PEFT model is unloaded: its base is what is returned. LoRA on the same base,
    or in a PeftModel that this one is around, is merged first: `merge_and_unload()` of LoRA's PeftModel.

    Args:
        peft_model: the PeftModel that was made with the `KromHCPeftConfig`.
        adapter_name: which adapter, the active one if None.

    Raises:
        ValueError: if the adapter is of another method, adapters of other methods are on the same base, or modules
            beside the hyper-connections were trained; the PEFT model is then what it was.
    """
    name = adapter_name or peft_model.active_adapter
    config = peft_model.peft_config[name]
    if not isinstance(config, KromHCPeftConfig):
        raise ValueError(f"adapter {name!r} must be of a KromHCPeftConfig; got {type(config).__name__}.")
    if not isinstance(peft_model.base_model, HyperConnectionTuner):
        raise ValueError(
            f"peft_model must be the PeftModel that get_peft_model made for adapter {name!r}; got one of a "
            f"{type(peft_model.base_model).__name__}. Give that one."
        )
    base = plain_base(peft_model)
    _refuse_other_adapters(base)
    # Everything that can fail comes before the adapter is taken off. A PeftModel in between has its prefix in the keys.
    wrapped = get_peft_model_state_dict(peft_model, adapter_name=name)
    between = WRAPPER_PREFIX * (_depth(peft_model) - 1)
    tensors = model_keys({key.removeprefix(between): tensor for key, tensor in wrapped.items()})
    check_whole(base)
    plan_adapter(base, config)
    sites: dict[str, Any] = branches(base)
    own = {path: site for path, site in sites.items() if name in site.options}
    kernels = {path: site.hyper_connection_adapters[name].kernel for path, site in own.items()}
    # The modules' own: those of the configuration may have been changed since.
    options: StreamOptions = next(iter(own.values())).options[name]
    peft_model.unload()
    # PEFT before 0.20 leaves it on a base that a merged adapter has gone from.
    vars(base).pop("peft_config", None)
    model = apply_hyper_connections(base, **options.to_dict())
    load_hyper_connection_state_dict(model, tensors, f"adapter {name!r}")
    for path, hyper_connection in branches(model).items():
        hyper_connection.kernel = kernels[path]
    return model


def _refuse_other_adapters(base: Any) -> None:
    others = {
        type(module).__name__
        for module in base.modules()
        if isinstance(module, BaseTunerLayer) and not isinstance(module, StreamSite)
    }
    if others:
        raise ValueError(
            f"The base must have no other adapters; got layers of type {', '.join(sorted(others))}. "
            "Merge them first, with merge_and_unload() of their own PeftModel; around another one PEFT may fail to, so "
            "put both on the base itself."
        )


def _depth(peft_model: Any) -> int:
    """How many PeftModels there are around each other."""
    return 1 + _depth(peft_model.get_base_model()) if isinstance(peft_model, PeftModel) else 0


def model_to_adapter(
    model: Any, destination: str | Path, base_model: str | Path | None = None, base_revision: str | None = None
) -> KromHCPeftConfig:
    """Writes the hyper-connections of a full model as a PEFT adapter, to be loaded on its base.

    Only the hyper-connections are written. `base_model` must have the same other weights, as a conversion or a training
    with a frozen backbone leaves them; where it is on disk here, that is checked.

    Args:
        model: a model with hyper-connections.
        destination: folder for `adapter_config.json` and `adapter_model.safetensors`; made if missing.
        base_model: folder or Hub id of the base, written into the config; a folder by its absolute path. By default
            where the model says that it comes from.
        base_revision: of the Hub repository of the base, likewise; by default as in `save_hyper_connections`.

    Raises:
        ValueError: if the model has no hyper-connections, or the base is not known, of another family or has other
            weights.
    """
    if not has_hyper_connections(model):
        raise ValueError(f"model must have hyper-connections to write as an adapter; got {type(model).__name__}.")
    hf_config = model.config
    base = find_base(model, None if base_model is None else str(base_model), base_revision)
    config = KromHCPeftConfig(
        task_type=TASK_TYPES.get(auto_class_of(model).__name__),
        inference_mode=True,
        base_model_name_or_path=base.name,
        revision=base.revision,
        base_model_type=hf_config.model_type.removeprefix(PREFIX),
        base_hidden_size=hf_config.get_text_config().hidden_size,
        base_num_layers=hf_config.get_text_config().num_hidden_layers,
        base_family=row_to_carry(hf_config),
        **hf_config.stream_options().to_dict(),
    )
    tensors = {key: tensor.contiguous().cpu() for key, tensor in hyper_connection_state_dict(model).items()}
    Path(destination).mkdir(parents=True, exist_ok=True)
    save_file(adapter_keys(tensors), Path(destination) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    # Last: a folder with a configuration is an adapter.
    config.save_pretrained(str(destination))
    return config


def adapter_to_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Writes the full model that an adapter and its base make, with the base's tokenizer and generation files.

    Args:
        source: folder of an adapter that was made with `KromHCPeftConfig`.
        destination: folder to make; must not exist or be empty.
        base: folder or Hub id of the base, by default the one that the adapter names.
        trust_remote_code: whether code in the base may be run, as of `convert_checkpoint`.

    Raises:
        FileNotFoundError: if the base cannot be found.
        FileExistsError: if the destination is not empty.
        ValueError: if the adapter is of another method or for another base, names no base, or lacks a tensor.
    """
    path = Path(source) / ADAPTER_CONFIG
    content = read_json(path)
    if content.get("peft_type") != ADAPTER_TYPE:
        raise ValueError(
            f"{path} must be of an adapter of hyper-connections, with peft_type {ADAPTER_TYPE!r}; got "
            f"{content.get('peft_type')!r}. Adapters of other methods are merged into their base by PEFT."
        )
    named = base or content.get("base_model_name_or_path")
    if not named:
        raise ValueError(f"{path} must name its base in base_model_name_or_path; got {named!r}. Give it with --base.")
    config, destination = KromHCPeftConfig.from_pretrained(str(source)), Path(destination)
    tensors = model_keys(_adapter_tensors(Path(source)))
    checkpoint = BaseCheckpoint.open(named, None if base else config.revision, code=trust_remote_code)
    checkpoint.check_companions()
    with with_carried_row(str(config.base_model_type), config.base_family, path):
        model = StoredModel.open(checkpoint.folder, trust_remote_code=trust_remote_code).load()
        plan_adapter(model, config)
    apply_hyper_connections(model, **config.stream_options().to_dict())
    load_hyper_connection_state_dict(model, tensors, source)
    model.config.hc_conversion = checkpoint.origin
    with new_folder(destination) as target:
        model.save_pretrained(target)
        checkpoint.bring_companions(target)
        (target / CARD).write_text(model_card(model.config, real_path(destination).name), encoding="utf-8")


def _adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter file."""
    files = [folder / name for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) if (folder / name).is_file()]
    if not files:
        raise FileNotFoundError(f"{folder} must hold {SAFETENSORS_WEIGHTS_NAME}; it does not. Fetch it.")
    try:
        return load_peft_weights(str(folder), device="cpu")
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"{files[0]} must be a complete file of tensors; {error}. Fetch it again.") from error


def checkpoint_to_adapter(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Writes the hyper-connections of a model as an adapter of its base, whose other tensors must be the same.

    Args:
        source: folder of a model with hyper-connections.
        destination: folder to make; must not exist or be empty.
        base: folder or Hub id of the base, by default the one that the model says it was converted from.
        trust_remote_code: whether code in the two may be run, as of `convert_checkpoint`.

    Raises:
        FileExistsError: if the destination is not empty.
        ValueError: if the base is not known, or has other weights than the model.
    """
    model = StoredModel.open(source, trust_remote_code=trust_remote_code).with_streams().load()
    origin = getattr(model.config, "hc_conversion", None) or {}
    named, revision = (base, None) if base else (origin.get("base_model"), origin.get("base_revision"))
    if not named:
        raise ValueError(f"the base of an adapter must be known; {source} does not say its own. Give it with --base.")
    own, folder = model.state_dict(), BaseCheckpoint.open(named, revision, code=trust_remote_code).folder
    plain = StoredModel.open(folder, trust_remote_code=trust_remote_code).load()
    for name, tensor in plain.state_dict().items():
        if name not in own or not torch.equal(own[name], tensor):
            raise ValueError(
                f"the base of an adapter must have the same weights as the model; {named} differs in {name!r}. "
                "A model whose backbone was trained has to stay a full model."
            )
    with new_folder(Path(destination)) as target:
        model_to_adapter(model, target, str(named), revision)
