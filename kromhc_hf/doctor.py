"""What is installed, which kernel would run and why, and how each tool that is there is used with this package."""

import json
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .modeling.releases import NEWEST, OLDEST, numbered, release


PACKAGES = ("torch", "transformers", "huggingface-hub", "safetensors", "peft", "accelerate", "triton", "matplotlib")
# Written by `make clients` together with docs/works-with.md: what each tool is called, its package, and how it is used.
TOOLS = Path(__file__).with_name("works_with.json")
# Streams in bf16 of a common width; what decides is the dtype, and whether the width is a multiple of 16.
NUM_STREAMS, WIDTH, VARIANT = 4, 1024, "kromhc"


def diagnosis(model: str | None = None, trust_remote_code: bool = False) -> dict[str, Any]:
    """Everything that `kromhc doctor` tells, as JSON can say it.

    Args:
        model: folder or Hub id of a model, to tell how it would be handled; None for none.
        trust_remote_code: whether its code may be run to look at it.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if its code would have to be trusted.
    """
    found = {
        "versions": {"python": platform.python_version(), **dict(_versions(("kromhc-hf", *PACKAGES)))},
        "transformers": _transformers(),
        "kernel": _kernel(),
        "tools": _tools(),
    }
    if model is not None:
        from .how_handled import how_handled

        found["model"] = how_handled(model, trust_remote_code)._asdict()
    return found


def _versions(packages: tuple[str, ...]) -> Iterator[tuple[str, str | None]]:
    for package in packages:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, None


def _transformers() -> str:
    """Whether the tests know the installed release."""
    tested = f"{numbered(OLDEST)} to {numbered(NEWEST)}"
    return f"tested, as are {tested}" if release() <= NEWEST else f"newer than the tested ones, {tested}"


def _kernel() -> dict[str, str]:
    """What `kernel="auto"` runs on the accelerator that there is, or else on the CPU, and why."""
    import torch

    from .modeling.kernels import chosen

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = accelerator or torch.device("cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    kernel, reason = chosen(device, torch.bfloat16, NUM_STREAMS, WIDTH, VARIANT)
    return {"device": f"{device} ({name})", "runs": kernel, "why": reason}


def _tools() -> list[dict[str, str]]:
    """The tools of docs/works-with.md that are installed, with what was seen of them."""
    listed = json.loads(TOOLS.read_text(encoding="utf-8"))
    present = dict(_versions(tuple(tool["package"] for tool in listed)))
    return [{**tool, "installed": str(present[tool["package"]])} for tool in listed if present[tool["package"]]]
