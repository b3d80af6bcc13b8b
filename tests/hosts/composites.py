"""Runs the tests of models of several modalities on the release in front of the path: `composites.py OUTPUT`.

What the release's own model cannot do is told from what is ours: it is put to the same where a test fails.
"""

import dataclasses
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
import transformers
from hosts.outcomes import COMPOSITE_CHECKS, Outcome, words
from support.composite import composite_inputs, make_composite, other_image

from kromhc_hf import composite_model_types


FUNCTIONS = (
    "test_logits_with_an_image_and_the_way_back",
    "test_generation_with_cache_and_left_padding",
    "test_saved_and_loaded_with_streams_apart",
    "test_gradients_under_checkpointing",
)
TESTS = Path(__file__).resolve().parents[1] / "modeling" / "test_composite_models.py"


class Collector:
    """What came out of each test, by the name of its function and by model type."""

    def __init__(self) -> None:
        self.reasons: dict[str, dict[str, str]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.passed:
            return
        test, _, model_type = report.nodeid.rpartition("::")[2].rstrip("]").partition("[")
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = "" if report.passed else str(getattr(crash, "message", report.longrepr)).splitlines()[0][:160]
        self.reasons.setdefault(test, {})[model_type] = reason


def saved_and_loaded(model: Any) -> str:
    """What the release's own model loses on the way to a folder and back."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors = type(model).from_pretrained(folder).state_dict()
    lost = [name for name, tensor in model.state_dict().items() if not torch.equal(tensors[name], tensor)]
    return f"{lost[0]} is another after loading" if lost else ""


def native_failure(model_type: str, check: str) -> str:
    """Why the release's own model cannot do it either, and nothing if it can."""
    try:
        model = make_composite(model_type)
        inputs = composite_inputs(model_type, model)
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits
            if check == "image" and torch.equal(model(**other_image(inputs), use_cache=False).logits, logits):
                return "the image has no effect"
        if check == "image, saving":
            return saved_and_loaded(model)
        if check == "image, checkpointing":
            model.train()(**inputs, labels=inputs["input_ids"], use_cache=False)
    except Exception as error:
        return words(error)
    return ""


def outcomes() -> dict[str, dict[str, Outcome]]:
    """Of every check and every model type that the release has."""
    collector = Collector()
    pytest.main(["-q", "-p", "no:cacheprovider", str(TESTS)], plugins=[collector])
    results: dict[str, dict[str, Outcome]] = {}
    for check, test in zip(COMPOSITE_CHECKS, FUNCTIONS, strict=True):
        for model_type in composite_model_types():
            reason = collector.reasons[test].get(model_type, "was not run")
            failure = native_failure(model_type, check) if reason else ""
            results.setdefault(check, {})[model_type] = Outcome(failure or reason, native=bool(failure))
    return results


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = outcomes()
    serial = {check: {name: dataclasses.asdict(o) for name, o in row.items()} for check, row in found.items()}
    Path(sys.argv[1]).write_text(json.dumps({"version": transformers.__version__, "results": serial}))
