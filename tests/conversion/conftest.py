"""Bases to convert."""

from pathlib import Path

import pytest
from support.outside import OUTSIDE, make_repository
from support.tiny import configurations, make_model

from kromhc_hf import convert_checkpoint


@pytest.fixture
def base(tmp_path) -> Path:
    """A tiny llama in one file."""
    make_model(configurations("llama")[0]).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def sharded_base(tmp_path) -> Path:
    """A tiny llama in several shards."""
    make_model(configurations("llama")[0]).save_pretrained(tmp_path / "base", max_shard_size="40KB")
    return tmp_path / "base"


@pytest.fixture
def licensed_base(tmp_path) -> Path:
    """A tiny llama in several shards, with a card that names its license."""
    make_model(configurations("llama")[0]).save_pretrained(tmp_path / "base", max_shard_size="60KB")
    (tmp_path / "base/README.md").write_text("---\nlicense: other\nlicense_name: tiny\nlanguage: en\n---\n# Base\n")
    return tmp_path / "base"


@pytest.fixture
def converted(licensed_base, tmp_path) -> Path:
    """The licensed base with hyper-connections."""
    convert_checkpoint(licensed_base, tmp_path / "converted", base_model="ada/base", verify=True)
    return tmp_path / "converted"


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> dict[str, Path]:
    """A folder for each base whose code is not in transformers, as a repository of the Hub has it."""
    home = tmp_path_factory.mktemp("repositories")
    return {name: make_repository(name, home / f"{name}_base") for name in OUTSIDE}
