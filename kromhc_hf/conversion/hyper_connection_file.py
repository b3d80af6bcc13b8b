"""Hyper-connections without their base model: one small file that says which base it belongs to."""

import copy
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from ..applying import apply_hyper_connections, has_hyper_connections
from ..carried_row import row_to_carry, with_carried_row
from ..modeling.configuration_kromhc import ORIGIN
from ..modeling.model_card import model_card
from ..modeling.modeling_kromhc import FACES, KromHCForCausalLM
from ..modeling.options import OPTIONS
from ..training import hyper_connection_state_dict, load_hyper_connection_state_dict
from .base import HUB_ID
from .files import CARD, may_write_card, refuse_revision
from .hub import upload
from .loaded_base import BaseDigests, auto_class_of, find_base


FILE = "hyper_connections.safetensors"
DESCRIPTION = "kromhc"
DIGESTS = "base_digests"
FAMILY = "family"
# Files of earlier versions do not say; they are of causal language models.
AUTO_CLASS = "auto_class"
AUTO_CLASSES = {face.auto_class.__name__: face.auto_class for face in FACES}
DESCRIPTION_KEYS = ("base_model", "base_revision", "model_type", "options")


def save_hyper_connections(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    base_revision: str | None = None,
) -> Path:
    """Saves the hyper-connections of a model alone, with the id and revision of the base that they belong to.

    The base's own parameters must be those of the base checkpoint, as they are with `freeze_backbone`; they are not
    saved, but digests of them are, and the row of a family from outside. `load_hyper_connections(folder)` makes the
    model again, on the same base alone.

    Args:
        model: a model with hyper-connections.
        folder: where `hyper_connections.safetensors` and a model card are written; a card of your own stays.
        base_model: Hub id or folder of the base; by default where the model says that it comes from.
        base_revision: of the base; by default the commit in the cache of the Hub that has the same weights as the
            model, or, if the cache has none, the one of the main branch now. None for a folder.

    Returns:
        The path of the file.

    Raises:
        ValueError: if the model has no hyper-connections, or its base is not known or has other weights on disk.
    """
    metadata, card = _description(model, base_model, base_revision, Path(folder).name)
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder) / FILE
    save_file(_tensors(model), path, metadata=metadata)
    # Beside a whole model the card is that model's.
    if may_write_card(Path(folder)) and not (Path(folder) / "config.json").exists():
        (Path(folder) / CARD).write_text(card, encoding="utf-8")
    return path


def push_hyper_connections(
    model: Any,
    repo_id: str,
    *,
    base_model: str | None = None,
    base_revision: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload hyper-connections",
) -> str:
    """Uploads the hyper-connections of a model alone, see `save_hyper_connections` and `push_checkpoint`.

    Returns:
        The address of the commit.

    Raises:
        ValueError: if the model has no hyper-connections, its base is not known or only a folder here, or a private
            repository is asked for and a public one is there.
        OSError: if the Hub refuses the token or the repository, or the connection breaks.
    """
    metadata, card = _description(model, base_model, base_revision, repo_id)
    base = json.loads(metadata[DESCRIPTION])["base_model"]
    if Path(base).is_dir():
        raise ValueError(
            f"base_model must be a Hub id, since others do not have the folder; got {base!r}. "
            "Push the base too, or give its id: base_model='ORG/NAME'."
        )
    operations = [
        CommitOperationAdd(FILE, save(_tensors(model), metadata=metadata)),
        CommitOperationAdd(CARD, card.encode()),
    ]
    return upload(operations, repo_id, private, revision, token, commit_message)


def load_hyper_connections(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    base_model: str | os.PathLike[str] | None = None,
    base_revision: str | None = None,
    token: str | bool | None = None,
    **kwargs: Any,
) -> Any:
    """Loads a base model and the hyper-connections that `source` holds for it.

    The row of a family from outside comes with them, and is registered unless there is one.

    Args:
        source: folder, file or Hub id with what `save_hyper_connections` or `push_hyper_connections` wrote.
        revision: of the repository with the hyper-connections.
        base_model: where to load the base from instead of the id or folder that the file names.
        base_revision: of the repository of the base.
        token: of the Hub.
        **kwargs: for `from_pretrained` of the base, such as `dtype`.

    Returns:
        The model with hyper-connections.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or made for another base, or a revision is asked for of something on disk.
        OSError: if the base cannot be loaded.
    """
    path = _find(source, revision, token)
    description, tensors = _read(path)
    if base_model is None:
        base_model, base_revision = description["base_model"], base_revision or description["base_revision"]
    auto_class = AUTO_CLASSES[description[AUTO_CLASS]]
    model = _load_base(path, base_model, auto_class, revision=base_revision, token=token, **kwargs)
    if model.config.model_type != description["model_type"]:
        raise ValueError(
            f"base_model must be of model_type {description['model_type']!r}, for which the hyper-connections in "
            f"{path} were made; {base_model} is {model.config.model_type!r}."
        )
    known = description.get(DIGESTS)
    different = BaseDigests(**known).first_difference(model) if known else None
    if different is not None:
        raise ValueError(
            f"base_model must be the base that the hyper-connections in {path} were made for, "
            f"{description['base_model']} at {description['base_revision'] or 'its only state'}; {different} of "
            f"{base_model} is another one. Give that base, with base_model and base_revision, in the dtype in which it "
            "was saved."
        )
    with with_carried_row(model.config.model_type, description.get(FAMILY), path):
        apply_hyper_connections(model, **description["options"])
        load_hyper_connection_state_dict(model, tensors, path)
    return model


def _tensors(model: Any) -> dict[str, Tensor]:
    return {name: tensor.cpu().contiguous() for name, tensor in hyper_connection_state_dict(model).items()}


def _description(
    model: Any, base_model: str | None, base_revision: str | None, name: str
) -> tuple[dict[str, str], str]:
    """The metadata of the file and the text of the model card."""
    if not has_hyper_connections(model):
        raise ValueError(
            f"model must have hyper-connections; got {type(model).__name__} without them. "
            "Call apply_hyper_connections(model, num_streams=4) first."
        )
    config = copy.copy(model.config)
    base = find_base(model, base_model, base_revision)
    description = {
        "base_model": base.name,
        "base_revision": base.revision,
        "model_type": config.backbone_config_class.model_type,
        AUTO_CLASS: auto_class_of(model).__name__,
        "options": config.stream_options().to_dict(),
        DIGESTS: asdict(base.digests),
    }
    if (family := row_to_carry(config)) is not None:
        description[FAMILY] = family
    on_hub = {} if Path(base.name).is_dir() else {"base_model": base.name, "base_revision": base.revision}
    config.hc_conversion = {"license": (getattr(config, ORIGIN, None) or {}).get("license"), **on_hub}
    return {"format": "pt", DESCRIPTION: json.dumps(description)}, model_card(config, name, weights="hyper-connections")


def _load_base(path: Path, base_model: str | os.PathLike[str], auto_class: Any, **kwargs: Any) -> Any:
    """The base; what goes wrong is said with the name of the file that asks for it."""
    folder = Path(base_model)
    if folder.is_dir():
        refuse_revision(folder, kwargs["revision"])
    reason = f"there is no such folder, seen from {Path.cwd()}, and it is no Hub id"
    if folder.is_dir() or HUB_ID.fullmatch(str(base_model)):
        try:
            return auto_class.from_pretrained(base_model, **{"trust_remote_code": False, **kwargs})
        except OSError as error:
            seen = "" if folder.is_dir() else f"there is no such folder, seen from {Path.cwd()}, and as a Hub id: "
            reason = seen + str(error).splitlines()[0]
    raise FileNotFoundError(
        f"the base of {path} must be a folder or a Hub id that can be read; got {str(base_model)!r} ({reason}). "
        "Say where it is: base_model=FOLDER or 'ORG/NAME'."
    )


def _find(source: str | os.PathLike[str], revision: str | None, token: str | bool | None) -> Path:
    path = Path(source)
    path = path / FILE if path.is_dir() else path
    if path.is_file():
        refuse_revision(path, revision)
        return path
    try:
        validate_repo_id(str(source))
        return Path(hf_hub_download(str(source), FILE, revision=revision, token=token))
    except (HFValidationError, HTTPError, EntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"source must be a folder or Hub id with {FILE}; got {str(source)!r} ({str(error).splitlines()[0]}). "
            "Check the path, or the id and your network and token."
        ) from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the file says about its base, and its tensors.

    Raises:
        ValueError: if it is damaged or was not written by this package.
    """
    try:
        with safe_open(path, "pt") as file:
            description = json.loads((file.metadata() or {}).get(DESCRIPTION, "null"))
            tensors = {name: file.get_tensor(name).to(torch.float32) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} must be a complete safetensors file; {error}. Fetch the file again.") from error
    known = {AUTO_CLASS: KromHCForCausalLM.auto_class.__name__, **description} if isinstance(description, dict) else {}
    missing = [key for key in DESCRIPTION_KEYS if key not in known]
    options, digests = known.get("options"), known.get(DIGESTS, {"complete": False, "tensors": {}})
    wrong = not isinstance(options, dict) or not options.keys() <= OPTIONS.keys()
    if missing or wrong or not isinstance(digests, dict) or digests.keys() != {"complete", "tensors"}:
        without = f", without {missing[0]!r}" if missing else ""
        raise ValueError(
            f"{path} must say which base and options it belongs to, as save_hyper_connections writes it; "
            f"got {description!r}{without}. Save it again with save_hyper_connections."
        )
    if known[AUTO_CLASS] not in AUTO_CLASSES:
        raise ValueError(
            f"{path} must be for a base of one of {', '.join(AUTO_CLASSES)}; it is for {known[AUTO_CLASS]!r}. "
            "Load it with the version of kromhc-hf that saved it."
        )
    return known, tensors
