"""transformers' common model and training tests as cases, for KromHC classes with the native classes as control."""

import functools
import inspect
import os
import random
import re
import unittest
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from distribution import import_suite
from support.tiny import configurations

from kromhc_hf import KromHCConfig
from kromhc_hf.modeling.modeling_kromhc import FACES


# The suite skips these kinds of tests unless it is asked for them, when it is imported.
os.environ.setdefault("RUN_TRAINING_TESTS", "1")

FAMILIES = ("llama", "gpt2", "qwen3", "gpt_neox", "mixtral", "gemma2", "olmo2", "phi3", "lfm2", "qwen3_next")

PASSED, SKIPPED, FAILED = "passed", "skipped", "failed"


class Outcome(NamedTuple):
    """What one test gave for KromHC, and, unless it passed, for the native class."""

    status: str
    detail: str = ""
    native: str | None = None

    @property
    def ours(self) -> bool:
        """Whether KromHC falls short of the native class."""
        return self.status != PASSED and self.native == PASSED


class ModelTester:
    """What the common tests ask of a family: a small configuration and a batch."""

    is_training = True
    batch_size, seq_length = 3, 7

    def __init__(self, family: str, hyper_connected: bool):
        self.config = configurations(family)[0]
        self.config.num_hidden_layers = 2
        if getattr(self.config, "layer_types", None) is not None:
            self.config.layer_types = self.config.layer_types[:2]
        config: Any = KromHCConfig(backbone_config=self.config)
        faces = [face for face in FACES if face.backbone_for(type(config)) is not None]
        if hyper_connected:
            self.config = config
            self.classes = tuple(face.class_for(config) for face in faces)
        else:
            self.classes = tuple(face.backbone_for(type(config)) for face in faces)
        self.causal_lm_class = next(
            cls for cls in self.classes if "CausalLM" in cls.__name__ or "LMHead" in cls.__name__
        )
        self.num_hidden_layers = self.config.num_hidden_layers
        self.num_attention_heads = self.config.num_attention_heads
        self.hidden_size = self.config.hidden_size

    def get_config(self) -> Any:
        return type(self.config).from_dict(self.config.to_dict())

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        ids = torch.randint(3, self.config.vocab_size, (self.batch_size, self.seq_length))
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


@functools.cache
def suite_class(family: str, hyper_connected: bool) -> type[unittest.TestCase]:
    """The unittest class of a family, KromHC or native."""
    common = import_suite("test_modeling_common").ModelTesterMixin
    training = import_suite("test_training_mixin").TrainingTesterMixin
    tester = ModelTester(family, hyper_connected)
    namespace = {"model_tester": tester, "all_model_classes": tester.classes, "has_attentions": True}
    return type(f"{'KromHC' if hyper_connected else 'Native'}Test", (common, training, unittest.TestCase), namespace)


def names_of_tests(family: str) -> list[str]:
    """The tests of the suite, without its switches, and without the templates of parameterised tests."""
    cls = suite_class(family, True)
    names = [name for name in dir(cls) if name.startswith("test_") and callable(getattr(cls, name))]
    templates = {match[1] for match in map(re.compile(r"(\w+?)_\d+(_\w+)?$").match, names) if match}
    return sorted(set(names) - templates)


@contextmanager
def known_to_the_suite(family: str) -> Iterator[None]:
    """Tells the suite what it finds out by class name or source file: the task of a class, and what applies to it."""
    tester = ModelTester(family, True)
    with ExitStack() as stack:
        for face in FACES:
            names = face.auto_class._model_mapping._model_mapping
            ours = {cls.__name__: cls.__name__ for cls in tester.classes if issubclass(cls, face)}
            stack.enter_context(mock.patch.dict(names, ours))
        for name in ("getmodule", "getfile"):
            function = partial(of_the_family, getattr(inspect, name))
            stack.enter_context(mock.patch.object(inspect, name, function))
        yield


def of_the_family(function: Callable[..., Any], thing: Any, *args: Any) -> Any:
    """Looks a generated class up where the family's own class is."""
    for name in ("backbone_class", "backbone_config_class"):
        thing = getattr(thing, name, thing) if inspect.isclass(thing) else thing
    return function(thing, *args)


def run_alone(family: str, name: str, hyper_connected: bool) -> tuple[str, str]:
    """Status and detail of one test of one class."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    result = unittest.TestResult()
    with known_to_the_suite(family):
        suite_class(family, hyper_connected)(name).run(result)
    problems = result.failures + result.errors
    if problems:
        return FAILED, "\n\n".join(text for _, text in problems)
    if result.skipped:
        return SKIPPED, result.skipped[0][1]
    return PASSED, ""


def run_case(family: str, name: str) -> Outcome:
    """Runs one test for KromHC, and for the native class where that did not pass."""
    status, detail = run_alone(family, name, True)
    native = None if status == PASSED else run_alone(family, name, False)[0]
    return Outcome(status, detail, native)
