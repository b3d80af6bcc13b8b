"""PEFT's own decoder tests, from the source distribution of the installed version, as functions of a checkpoint."""

import functools
import importlib
import inspect
import itertools
import subprocess
import sys
import tarfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch
from filelock import FileLock
from support.tiny import configurations, make_model

from kromhc_hf import KromHCConfig, freeze_backbone


CACHE = Path(__file__).resolve().parents[2] / ".cache" / f"peft-{peft.__version__}"
PACKAGE = "peft_suite_tests"
PASSED, SKIPPED, FAILED = "passed", "skipped", "failed"

# The suite's own list has no LN tuning and no trainable tokens by themselves.
ADDED_CONFIGS: list[tuple[type, dict[str, Any]]] = [
    (peft.LNTuningConfig, {"task_type": "CAUSAL_LM", "target_modules": None}),
    (peft.TrainableTokensConfig, {"task_type": "CAUSAL_LM", "token_indices": [0, 1, 3], "target_modules": None}),
]
# What a test may take beside a checkpoint and a configuration.
FURTHER = {"use_reentrant": (True, False), "dtype": (torch.float16, torch.bfloat16)}
METHODS = (peft.LoraConfig, peft.IA3Config, peft.PromptTuningConfig, peft.LNTuningConfig, peft.TrainableTokensConfig)


def fetch_suite() -> Path:
    """The `tests` folder of the source distribution, downloaded from the package index unless it is cached.

    Raises:
        RuntimeError: if it cannot be downloaded.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    archive = CACHE / f"peft-{peft.__version__}.tar.gz"
    with FileLock(CACHE / ".lock"):
        if not archive.is_file():
            command = [sys.executable, "-m", "pip", "download", f"peft=={peft.__version__}", "--dest", str(CACHE)]
            command += ["--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--quiet"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(
                    f"These tests need the source distribution of peft {peft.__version__}, which pip could not fetch:\n"
                    f"{done.stderr.strip()}\nConnect to an index, or put {archive.name} into {CACHE}."
                )
        folder = CACHE / f"peft-{peft.__version__}" / "tests"
        if not (folder / "testing_utils.py").is_file():
            with tarfile.open(archive) as tar:
                members = [m for m in tar.getmembers() if Path(m.name).parts[1:2] == ("tests",) and m.isfile()]
                tar.extractall(CACHE, members=members, filter="data")
    return folder


@functools.cache
def import_suite() -> types.ModuleType:
    """The module with the decoder tests."""
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(fetch_suite())]
    sys.modules[PACKAGE] = package
    # Imported by the suite's common part for its tests of image models.
    diffusers = types.ModuleType("diffusers")
    diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, {"diffusers": diffusers}):
        return importlib.import_module(f"{PACKAGE}.test_decoder_models")


def configs() -> list[tuple[str, type, dict[str, Any]]]:
    """The suite's configurations of the methods in question, with an id each."""
    chosen = [(cls, options) for cls, options in import_suite().ALL_CONFIGS if cls in METHODS] + ADDED_CONFIGS
    return [(f"{cls.__name__.removesuffix('Config')}{i}", cls, options) for i, (cls, options) in enumerate(chosen)]


def names_of_tests() -> list[str]:
    """The tests that take a checkpoint and a configuration."""
    found = inspect.getmembers(import_suite().TestDecoderModels, inspect.isfunction)
    wanted = ["self", "model_id", "config_cls", "config_kwargs"]
    tests = [(name, list(inspect.signature(test).parameters)) for name, test in found if name.startswith("test_")]
    return [name for name, names in tests if names[:4] == wanted and names[4:] in ([], *([more] for more in FURTHER))]


def save_models(folder: Path) -> dict[str, tuple[str, str]]:
    """Per family a checkpoint with hyper-connections that are off their init, and a native one as control."""
    saved = {}
    for name, model_type in (("tiny-random-LlamaForCausalLM", "llama"), ("tiny-random-GPT2LMHeadModel", "gpt2")):
        config = configurations(model_type)[0]
        model = make_model(KromHCConfig(backbone_config=config))
        for parameter in freeze_backbone(model).parameters():
            if parameter.requires_grad:
                parameter.data += 0.02 * torch.randn_like(parameter)
        model.save_pretrained(folder / "connected" / name)
        make_model(config).save_pretrained(folder / "native" / name)
        saved[model_type] = (str(folder / "connected" / name), str(folder / "native" / name))
    return saved


def run(test: str, model_id: str, config_cls: type, options: dict[str, Any]) -> tuple[str, str]:
    """Status and detail of one test on one checkpoint."""
    instance = import_suite().TestDecoderModels()
    function: Callable[..., None] = getattr(instance, test)
    names = list(inspect.signature(function).parameters)[3:]
    try:
        for further in itertools.product(*(FURTHER[name] for name in names)):
            torch.manual_seed(0)
            function(model_id, config_cls, dict(options), *further)
    except pytest.skip.Exception as skipped:
        return SKIPPED, str(skipped)
    # pytest's own failures, such as an error that was not raised, are no Exception.
    except (Exception, pytest.fail.Exception) as error:
        return FAILED, f"{type(error).__name__}: {error}"
    return PASSED, ""
