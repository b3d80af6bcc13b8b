"""Uploads of converted checkpoints to the Hub, in one commit, with their model card."""

import os
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from .checkpoint import CARD, read_json
from .configuration import PREFIX, KromHCConfig
from .model_card import model_card


def push_folder(
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
    not sent again, so after an interruption the same call goes on where the last one stopped.

    Args:
        folder: what `convert_checkpoint` or `save_pretrained` wrote.
        repo_id: "USER/NAME".
        private: whether a new repository is private.
        revision: branch to commit to; made if it does not exist.
        token: of the Hub; by default the one of `hf auth login`.

    Raises:
        ValueError: if the folder is not a checkpoint with hyper-connections.
        OSError: if the Hub refuses the token or the repository, or the connection breaks.
    """
    folder = Path(folder)
    content = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if not str(content.get("model_type")).startswith(PREFIX):
        raise ValueError(
            f"folder must hold a checkpoint with hyper-connections; {folder} has model_type "
            f"{content.get('model_type')!r}. Convert it first: kromhc convert {folder} DESTINATION."
        )
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CARD)
    operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), str(path)) for path in files]
    operations.append(CommitOperationAdd(CARD, _card(folder, KromHCConfig.from_dict(content), repo_id).encode()))
    return upload(operations, repo_id, private, revision, token, commit_message)


def upload(
    operations: list[CommitOperationAdd],
    repo_id: str,
    private: bool | None,
    revision: str | None,
    token: str | bool | None,
    commit_message: str,
) -> str:
    """Makes the repository if need be and commits the operations to it; returns the address of the commit.

    Raises:
        OSError: if the Hub refuses the token or the repository, or the connection breaks.
    """
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision).commit_url
    except HFValidationError as error:
        raise ValueError(f"repo_id must be USER/NAME; got {repo_id!r} ({error}).") from error
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise PermissionError(
                f"the token must be allowed to write to {repo_id!r}; the Hub answered {error.response.status_code}. "
                "Log in with a token that has write access: hf auth login."
            ) from error
        raise _interrupted(repo_id, error) from error
    except (RuntimeError, OSError) as error:  # the client wraps what happens to one file in a RuntimeError
        raise _interrupted(repo_id, error) from error


def _interrupted(repo_id: str, error: Exception) -> OSError:
    reason = str(error.__cause__ or error).strip().splitlines()
    return ConnectionError(
        f"the upload to {repo_id!r} did not finish ({reason[0] if reason else type(error).__name__}); nothing was "
        "committed. Run it again: files that have arrived are not sent a second time."
    )


def _card(folder: Path, config: KromHCConfig, repo_id: str) -> str:
    """The model card of the folder; the one that the conversion wrote gets the id of the repository."""
    path = folder / CARD
    present = path.read_text(encoding="utf-8") if path.is_file() else None
    if present is None or present == model_card(config, folder.name):
        return model_card(config, repo_id)
    return present
