"""Uploads of converted checkpoints to the Hub, in one commit, with their model card."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers.configuration_utils import PreTrainedConfig

from ..modeling.configuration_kromhc import KromHCConfig
from ..modeling.model_card import model_card
from ..modeling.model_types import PREFIX
from ..modeling.option_table import OPTIONS
from .base import model_content
from .files import CARD, REPLACED_WEIGHTS, may_write_card
from .outside import carries_derived_row, carries_row


# Folders of the Trainer, each with a copy of the model and the state of the optimizer, which it does not push either.
CHECKPOINTS = re.compile(r"checkpoint-\d+")


def push_checkpoint(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload model with hyper-connections",
) -> str:
    """Uploads a converted checkpoint to the Hub as it is, without loading it, and returns the address of the commit.

    The repository is made if it does not exist. Everything appears in one commit. Files that the Hub already has are
    not sent again, so after an interruption the same call goes on where the last one stopped. A model card that bears
    the mark of this package is written anew for the repository, any other one is sent as it is. Weights of an earlier
    upload that the folder does not have are deleted in the same commit: a loader might take them for the new ones.

    Args:
        folder: what `convert_checkpoint` or `save_pretrained` wrote; hidden folders in it, such as `.git`, and the
            checkpoints of a training stay here.
        repo_id: "USER/NAME".
        private: whether a new repository is private.
        revision: branch to commit to; made if it does not exist.
        token: of the Hub; by default the one of `hf auth login`.

    Raises:
        FileNotFoundError: if the folder has no config.json.
        ValueError: if the folder is not a checkpoint with hyper-connections, or a private repository is asked for and a
            public one is there.
        OSError: if the Hub refuses the token or the repository, or the connection breaks.
    """
    folder = Path(folder)
    content = model_content(folder)
    if not str(content.get("model_type")).startswith(PREFIX):
        raise ValueError(
            f"folder must hold a checkpoint with hyper-connections; {folder} has model_type "
            f"{content.get('model_type')!r}. Convert it first: kromhc convert {folder} DESTINATION."
        )
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    # Git and downloads keep their own in hidden folders, which the Hub takes from nobody.
    visible = [name for name in names if not any(part.startswith(".") for part in name.parts[:-1])]
    sent = [name for name in visible if not any(CHECKPOINTS.fullmatch(part) for part in name.parts[:-1])]
    files: dict[str, str | bytes] = {name.as_posix(): str(folder / name) for name in sent}
    if may_write_card(folder):
        files[CARD] = _card(content, folder, repo_id).encode()
    operations = [CommitOperationAdd(name, file) for name, file in files.items()]
    return upload(operations, repo_id, private, revision, token, commit_message, replaced=REPLACED_WEIGHTS)


def _card(content: dict[str, Any], folder: Path, repo_id: str) -> str:
    """The model card; of a family whose code is in the folder, from config.json alone, since none of it is run here."""
    if not carries_row(content):
        return model_card(KromHCConfig.from_dict(content), repo_id)
    said = {name: content[name] for name in content if name.startswith("hc_")}
    config: Any = PreTrainedConfig(**{f"hc_{name}": option.default for name, option in OPTIONS.items()} | said)
    config.model_type = content["model_type"]
    return model_card(config, repo_id, derived=carries_derived_row(folder))


# The name that it had first.
push_folder = push_checkpoint


def upload(
    operations: list[CommitOperationAdd],
    repo_id: str,
    private: bool | None,
    revision: str | None,
    token: str | bool | None,
    commit_message: str,
    replaced: re.Pattern[str] | None = None,
) -> str:
    """Makes the repository if need be and commits the operations to it; returns the address of the commit.

    Files there whose names match `replaced` are deleted unless the operations bring them.

    Raises:
        OSError: if the Hub refuses the token or the repository, or the connection breaks.
        ValueError: if a private repository is asked for and a public one is there.
    """
    api = HfApi(token=token)
    _refuse_public(api, repo_id, private)
    with _explained(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        sent = {operation.path_in_repo for operation in operations}
        present = api.list_repo_files(repo_id, revision=revision) if replaced else []
        stale = [name for name in present if replaced and replaced.fullmatch(name) and name not in sent]
        deleted = map(CommitOperationDelete, stale)
        return api.create_commit(
            repo_id, [*operations, *deleted], commit_message=commit_message, revision=revision
        ).commit_url


def check_push(repo_id: str, private: bool | None = None, token: str | bool | None = None) -> None:
    """Refuses, before any work is done, an upload for which there is no valid id or token.

    Raises:
        ValueError: if `repo_id` is not USER/NAME, or a private repository is asked for and a public one is there.
        OSError: if the Hub refuses the token, or cannot be reached.
    """
    api = HfApi(token=token)
    with _explained(repo_id):
        validate_repo_id(repo_id)
        api.whoami()
    _refuse_public(api, repo_id, private)


def _refuse_public(api: HfApi, repo_id: str, private: bool | None) -> None:
    with _explained(repo_id):
        public = private and api.repo_exists(repo_id) and not api.repo_info(repo_id).private
    if public:
        raise ValueError(
            f"private is for a new repository; {repo_id} exists and is public. Make it private on the Hub first, or "
            "leave private out."
        )


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Errors of the client, with the rule and the way out."""
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"the repository must be USER/NAME; got {repo_id!r} ({error}).") from error
    except (HTTPError, RuntimeError, OSError) as error:  # what happens to one file comes wrapped in a RuntimeError
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status in (401, 403) or isinstance(error, LocalTokenNotFoundError):
            answer = f"the Hub answered {status}" if status else "there is none"
            raise PermissionError(
                f"the token must be allowed to write to {repo_id!r}; {answer}. "
                "Log in with a token that has write access: hf auth login."
            ) from error
        reason = str(error.__cause__ or error).strip().splitlines()
        raise ConnectionError(
            f"the upload to {repo_id!r} did not finish ({reason[0] if reason else type(error).__name__}); nothing was "
            "committed. Push the folder again (kromhc push): files that have arrived are not sent a second time."
        ) from error
