"""The client of huggingface_hub in this process, turned to a Hub on this machine."""

from pathlib import Path

import huggingface_hub
import pytest
import transformers.utils.hub
from huggingface_hub import constants
from support.hub_server import TOKEN, HubServer


def turn_client_to(server: HubServer, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Until the test ends, the client talks to this server, with the right token and this cache."""
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)  # from 5.18 on
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def push_base(base: Path, repo_id: str = "ada/base") -> str:
    """What somebody else has uploaded; returns the commit."""
    api = huggingface_hub.HfApi()
    api.create_repo(repo_id)
    return api.upload_folder(repo_id=repo_id, folder_path=base).oid
