"""Candidates timed in turn in one run, so that all of them see the same machine."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


WARM_UP_ROUNDS = 2


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turn(candidates: Mapping[str, Callable[[], Any]], rounds: int, cpu_time: bool = False) -> dict[str, list[float]]:
    """Seconds of every candidate in every round; all run once in each."""
    clock = time.process_time if cpu_time else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for attempt in range(rounds + WARM_UP_ROUNDS):
        for name, run in candidates.items():
            synchronize()
            start = clock()
            run()
            synchronize()
            if attempt >= WARM_UP_ROUNDS:
                seconds[name].append(clock() - start)
    return seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The median over the rounds of the ratio within the round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def device_name(device: str) -> str:
    """What a number was measured on."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    described = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = (line.split(":")[1].strip() for line in described if line.startswith("model name"))
    return next(named, platform.processor())
