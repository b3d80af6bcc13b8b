"""Which base a model has in memory: digests of its weights, and where the checkpoint is that has the same."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import constants
from safetensors import safe_open
from torch import Tensor

from ..modeling.configuration_kromhc import ORIGIN
from ..modeling.host import commit_of
from ..modeling.stream_module import StreamModule
from ..training import gathered, sharded, unwrapped
from .base import HUB_ID
from .files import find_weights, read_json, refuse_revision
from .stored_tensors import places_in_model
from .tensor_files import read_pickled


# What a base may be loaded in, and the integers that hold its bits.
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
SAMPLES = 64


def digest(tensor: Tensor, dtype: torch.dtype) -> str:
    """64 bits of a floating-point tensor as it is in `dtype`: of its shape, the sum of all its bits, and 64 values.

    The bits are summed as integers, modulo 2^64, so neither the device nor the order of summing matters, and one
    changed value changes the sum. The values at 64 evenly spread places tell one order from another.
    """
    bits = tensor.detach().to(dtype).contiguous().flatten().view(BITS[dtype.itemsize])
    places = torch.linspace(0, max(bits.numel() - 1, 0), min(SAMPLES, bits.numel()), dtype=torch.float64).long()
    content = (list(tensor.shape), bits.sum(dtype=torch.int64).item(), bits[places.to(bits.device)].tolist())
    return hashlib.blake2b(repr(content).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class BaseDigests:
    """What the base of a model is known by.

    Args:
        complete: whether every tensor could be read; quantised ones, and what is not in memory, have no digests.
        tensors: for every name the digests in the tensor's own dtype, first, and in those that are no wider, since the
            same base may be loaded in one of them.
    """

    complete: bool
    tensors: dict[str, dict[str, str]]

    @classmethod
    def of(cls, model: Any) -> "BaseDigests":
        """The digests of everything in a model but its hyper-connections."""
        tensors = {}
        for name, tensor in base_tensors(model):
            own = str(tensor.dtype).removeprefix("torch.")
            narrower = (other for other, dtype in DTYPES.items() if dtype.itemsize <= tensor.dtype.itemsize)
            tensors[name] = {other: digest(tensor, DTYPES[other]) for other in dict.fromkeys((own, *narrower))}
        return cls(is_complete(model), tensors)

    def first_difference(self, model: Any) -> str | None:
        """The name of the first tensor of a model that is another one here, None if it has the same base."""
        present = set()
        for name, tensor in base_tensors(model):
            present.add(name)
            known = self.tensors.get(name, {})
            own = str(tensor.dtype).removeprefix("torch.")
            compared = own if own in known else next(iter(known), None)
            if compared and digest(tensor, DTYPES[compared]) != known[compared]:
                return name
        alone = sorted(present ^ self.tensors.keys()) if self.complete and is_complete(model) else []
        return alone[0] if alone else None


class LoadedBase(NamedTuple):
    """The base that a model has in memory: its folder, as an absolute path, or its Hub id and commit, and digests."""

    name: str
    revision: str | None
    digests: BaseDigests


def find_base(model: Any, base_model: str | None, base_revision: str | None) -> LoadedBase:
    """Where the base is that a model has in memory.

    What is on disk here, in the folder or in the cache of the Hub, is compared with the model; where nothing says which
    commit was loaded, the one in the cache is found that has the same weights.

    Args:
        model: a model with hyper-connections.
        base_model: by default where the model says that it comes from.
        base_revision: of the Hub repository.

    Raises:
        ValueError: if the base is not known, or has other weights than the model.
    """
    origin, config = getattr(model.config, ORIGIN, None), model.config
    if base_model is None and origin is not None:
        base_model, base_revision = origin.get("base_model"), base_revision or origin.get("base_revision")
    elif base_model is None:
        # Earlier releases of transformers write down the commit.
        base_model, base_revision = config.name_or_path, base_revision or getattr(config, "_commit_hash", None)
    model_type = config.backbone_config_class.model_type
    base_model = _checked_base(base_model, model_type)
    if any(hasattr(module, "get_base_layer") for module in model.modules()):
        raise ValueError(
            f"{base_model} alone must be the base; the model has adapters on it too, with which the hyper-connections "
            "were trained. Save the whole model with save_pretrained, or merge the adapters and save that base."
        )
    if Path(base_model).is_dir():
        refuse_revision(Path(base_model), base_revision)
        digests = BaseDigests.of(model)
        _refuse_difference(_first_stored_difference(model, digests, Path(base_model)), base_model)
        return LoadedBase(os.path.abspath(base_model), None, digests)
    commits = _cached_commits(base_model)
    commit = commit_of(base_model, base_revision) or base_revision
    if base_revision is not None:
        commits = {commit: commits[commit]} if commit in commits else {}
    differences, digests = {}, BaseDigests.of(model)
    for found, folder in commits.items():
        if (folder / "config.json").is_file():
            _checked_base(str(folder), model_type)
        try:
            differences[found] = _first_stored_difference(model, digests, folder)
        except (OSError, ValueError):
            continue  # no weights, or not all of them
        if differences[found] is None:
            return LoadedBase(base_model, found, digests)
    if len(differences) == len(commits):
        _refuse_difference(next(iter(differences.values()), None), base_model)
    return LoadedBase(base_model, commit, digests)


def auto_class_of(model: Any) -> Any:
    """The Auto class that makes a model with hyper-connections and its head.

    Raises:
        ValueError: if none makes that head.
    """
    found = unwrapped(model).auto_class
    if found is None:
        raise ValueError(
            f"the model must have a head that an Auto class makes, which loads its base; got {type(model).__name__}. "
            "Save the whole model with save_pretrained."
        )
    return found


def base_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors of the base, whole, one after the other; not those that cannot be read as such.

    Sharded ones are gathered, so with FSDP2 and ZeRO-3 all ranks must ask.
    """
    for name, tensor in _all_base_tensors(model):
        if _is_readable(tensor) and tensor.dtype in DTYPES.values():
            yield name, gathered(tensor)


def is_complete(model: Any) -> bool:
    """Whether all tensors of the base can be read and are what the checkpoint holds."""
    quantized = getattr(unwrapped(model).config, "quantization_config", None) is not None
    return not quantized and all(_is_readable(tensor) for _, tensor in _all_base_tensors(model))


def _all_base_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    model = unwrapped(model)
    own = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, StreamModule))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and not name.startswith(own):
            yield name, tensor


def _is_readable(tensor: Tensor) -> bool:
    """Not quantised, which is a subclass, nor offloaded to the meta device."""
    return (type(tensor) in (Tensor, torch.nn.Parameter) or sharded(tensor)) and tensor.device.type != "meta"


def _first_stored_difference(model: Any, digests: BaseDigests, folder: Path) -> str | None:
    """The name of the first tensor of a model that is not what a checkpoint holds under that name, None if none is.

    Tensors that a family stores under other names than it computes with are not compared.
    """
    present = digests.tensors
    weights = find_weights(folder, read_json(folder / "config.json"))
    # A base may be stored with or without its head, and by the names that it has there.
    prefix, compared = f"{unwrapped(model).base_model_prefix}.", False
    for file in weights.files:
        pickled = read_pickled(folder / file) if weights.pickled else {}
        held = pickled or (name for name, holder in weights.tensors.items() if holder == file)
        places = places_in_model(unwrapped(model), held)
        for name, tensor in pickled.items() if weights.pickled else _stored(folder / file):
            renamed = [places[name].name] if name in places and places[name].as_it_is else []
            names = (name, prefix + name, name.removeprefix(prefix), *renamed)
            here = next((n for n in names if n in present), None)
            if here is None or not tensor.is_floating_point():
                continue
            compared, (dtype, own) = True, next(iter(present[here].items()))
            if digest(tensor, DTYPES[dtype]) != own:
                return here
    if not compared:
        raise ValueError(
            f"the base in {folder} must have tensors of the model to compare it with; there is none that both have and "
            "that can be read. Save the whole model with save_pretrained."
        )
    return None


def _stored(path: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            yield name, file.get_tensor(name)


def _refuse_difference(name: str | None, base_model: str) -> None:
    if name is not None:
        raise ValueError(
            f"the base must be as it is in {base_model}; {name} is another one in the model, by training, merging or "
            "resizing, or because another revision was loaded. Save the whole model with save_pretrained, or the base "
            "that it has and give its folder with base_model, or the revision with base_revision."
        )


def _cached_commits(repo_id: str) -> dict[str, Path]:
    """The folders of a repository's commits in the cache of the Hub, main first."""
    cached = Path(constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
    main, snapshots = cached / "refs/main", cached / "snapshots"
    first = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
    folders = sorted(snapshots.iterdir()) if snapshots.is_dir() else []
    return {folder.name: folder for folder in sorted(folders, key=lambda folder: folder.name != first)}


def _checked_base(base_model: str | None, model_type: str) -> str:
    """The Hub id or folder of the base, if it may be one; what an id stands for is seen when it is loaded."""
    reason = ""
    if base_model:
        path = Path(base_model) / "config.json"
        found = read_json(path).get("model_type") if path.is_file() else None
        if found == model_type or (not path.parent.is_dir() and HUB_ID.fullmatch(base_model)):
            return base_model
        if not path.parent.is_dir():
            reason = f" (no folder seen from {Path.cwd()}, and no Hub id)"
        else:
            reason = f" ({path} has model_type {found!r})" if path.is_file() else f" ({path} does not exist)"
    got = f"{base_model!r}{reason}" if base_model else "none, and the model does not say what it comes from"
    raise ValueError(
        f"base_model must be the Hub id or folder of a base checkpoint of model_type {model_type!r}; got {got}. "
        "Give it: base_model='ORG/NAME'."
    )
