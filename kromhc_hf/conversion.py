"""A checkpoint with hyper-connections from one without: the base tensors stay as they are, a small file is added."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from .checkpoint import (
    WEIGHTS,
    WEIGHTS_INDEX,
    companions,
    copy_file,
    new_folder,
    read_json,
    resolve_source,
    weight_map,
    write_json,
)
from .configuration import PREFIX, KromHCConfig
from .hyper_connection import Float32Module
from .verification import ConversionReport, verify_conversion


HYPER_CONNECTIONS = "kromhc.safetensors"
OWN_INDEX = "kromhc.safetensors.index.json"


def convert_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    num_streams: int = 4,
    variant: str = "kromhc",
    init: str = "identity",
    readout: str = "mean",
    dynamic: bool = True,
    residual_logit: float = 4.0,
    eps: float = 1e-6,
    revision: str | None = None,
    verify: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ConversionReport:
    """Writes a checkpoint with n residual streams from a checkpoint without; no base tensor is loaded or rewritten.

    The destination holds the base's weight files as they are, one small file with the hyper-connections, the index
    that joins them, the configuration, and the tokenizer and generation files. It appears in one piece or not at all,
    and the source is only read.

    Args:
        source: folder of the base checkpoint, or its Hub id.
        destination: folder to make; must not exist or be empty.
        num_streams, variant, init, readout, dynamic, residual_logit, eps: see `KromHCConfig`.
        revision: of the Hub repository.
        verify: whether to run base and converted model afterwards and compare them, see `verify_conversion`.
        progress: called with the bytes copied so far and in all.

    Raises:
        FileNotFoundError: if the source does not exist or has no weights.
        FileExistsError: if the destination is not empty.
        ValueError: if the family or an option is not supported, the source is damaged or converted already.
    """
    folder, destination = resolve_source(source, revision), Path(destination)
    config = _converted_config(
        folder,
        hc_num_streams=num_streams,
        hc_variant=variant,
        hc_init=init,
        hc_readout=readout,
        hc_dynamic=dynamic,
        hc_residual_logit=residual_logit,
        hc_eps=eps,
    )
    base_map = weight_map(folder, read_json(folder / "config.json"))
    architecture, added = initial_hyper_connections(config)
    config.architectures = [architecture]
    with new_folder(destination) as target:
        _copy_base(folder, target, sorted(set(base_map.values())), progress)
        if added:
            save_file(added, target / HYPER_CONNECTIONS, metadata={"format": "pt"})
        _write_index(target, config, base_map, added)
    report = ConversionReport(
        source=str(source),
        destination=str(destination),
        model_type=config.model_type,
        num_streams=num_streams,
        variant=variant,
        init=init,
        base_tensors=len(base_map),
        added_parameters=sum(tensor.numel() for tensor in added.values()),
        added_bytes=sum(tensor.nbytes for tensor in added.values()),
    )
    return verify_conversion(folder, destination, report=report) if verify else report


def initial_hyper_connections(config: Any) -> tuple[str, dict[str, Tensor]]:
    """The class name of the converted causal language model, and its hyper-connection tensors by state-dict key.

    The model is built on the meta device, so that its size does not matter.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = {}
    for name, module in _added_modules(model):
        module.to_empty(device="cpu").reset_parameters()
        tensors.update({f"{name}.{key}": tensor for key, tensor in module.state_dict().items()})
    return type(model).__name__, tensors


def _added_modules(model: torch.nn.Module) -> Iterator[tuple[str, Float32Module]]:
    """What the conversion adds to a model: hyper-connections, and learned ends of the streams where there are any."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Float32Module))


def _converted_config(folder: Path, **options: Any) -> Any:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"source must be a checkpoint of transformers; {folder} has no config.json.")
    raw = read_json(folder / "config.json")
    model_type = raw.get("model_type", "")
    if model_type.startswith(PREFIX):
        raise ValueError(
            f"source must be a checkpoint without hyper-connections; {folder} has been converted already "
            f"(model_type {model_type!r}). Convert its base model instead."
        )
    config = KromHCConfig(backbone_config=AutoConfig.from_pretrained(folder), **options)
    vars(config).pop("auto_map", None)
    return config


def _copy_base(folder: Path, target: Path, weight_files: list[str], progress: Callable[[int, int], None]) -> None:
    files = [folder / name for name in weight_files]
    for companion in companions(folder):
        files += [companion] if companion.is_file() else [path for path in companion.rglob("*") if path.is_file()]
    total, done = sum(path.stat().st_size for path in files), 0

    def advance(amount: int) -> None:
        nonlocal done
        done += amount
        progress(done, total)

    for path in files:
        copy = target / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy_file(path, copy, advance)


def _write_index(target: Path, config: Any, base_map: dict[str, str], added: dict[str, Tensor]) -> None:
    config.save_pretrained(target)
    content = read_json(target / "config.json")
    index_name = WEIGHTS_INDEX
    if set(base_map.values()) == {WEIGHTS}:
        # transformers prefers model.safetensors to any index that is not named in the configuration.
        index_name = content["transformers_weights"] = OWN_INDEX
        write_json(target / "config.json", content)
    files = {path.name: path.stat().st_size for path in target.glob("*.safetensors")}
    names = {**base_map, **dict.fromkeys(added, HYPER_CONNECTIONS)}
    write_json(target / index_name, {"metadata": {"total_size": sum(files.values())}, "weight_map": names})
