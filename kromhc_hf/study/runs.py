"""The runs of a study: which are still to do, spread over processes, each result in a file of its own."""

import json
import multiprocessing
import os
import queue
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import training, worker
from .arm import Arm, StudyError
from .data import load_corpus
from .inputs import inputs
from .study_file import Study, file_name


Task = tuple[str, int]
Results = dict[str, dict[int, dict[str, Any]]]
# What a worker reports: arm, seed, steps done, loss in nats per token.
News = tuple[str, int, int, float]
POLL_SECONDS = 0.3


def result_path(folder: Path, name: str, seed: int) -> Path:
    return folder / "runs" / f"{file_name(name)}-seed{seed}.json"


def stored(folder: Path, name: str, seed: int) -> dict[str, Any] | None:
    """The result of a run under this name, if there is one."""
    path = result_path(folder, name, seed)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def changes(result: Mapping[str, Any], arm: Arm, shared: Path) -> list[str]:
    """In which settings a stored run is another than one of this arm; what it does not know were the defaults."""
    before, now = Arm().settings() | result["settings"], arm.settings()
    files = result.get("inputs") not in (None, inputs(arm, shared))
    return [key for key in now if before[key] != now[key]] + ["the files that these name"] * files


def finished(folder: Path, name: str, arm: Arm, seed: int, shared: Path) -> dict[str, Any] | None:
    """The result of a run, if there is one with exactly these settings and of the same files."""
    result = stored(folder, name, seed)
    return result if result is not None and not changes(result, arm, shared) else None


def write_atomically(path: Path, content: Any) -> None:
    """Writes JSON so that a file under this name is always a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def results(study: Study, folder: Path, shared: Path) -> Results:
    """All finished runs, by arm and seed."""
    found = {
        name: {seed: finished(folder, name, arm, seed, shared) for seed in study.seeds}
        for name, arm in study.arms.items()
    }
    return {name: {seed: run for seed, run in runs.items() if run} for name, runs in found.items()}


def refuse_other_device(found: Results, device: str) -> None:
    """Refuses runs of another kind of device, which computes in another precision.

    Raises:
        StudyError: naming both.
    """
    here = torch.device(device).type
    for runs in found.values():
        for run in runs.values():
            # Runs of earlier versions do not say.
            if (there := run.get("device", here)) != here:
                raise StudyError(
                    f"all runs of a study must be on one kind of device; the folder has some on {there}, and device is "
                    f"{here}. Use another folder."
                )


def execute(study: Study, folder: Path, shared: Path, workers: int, device: str = "cpu") -> None:
    """Does the runs that are not finished, seed by seed, so that an interrupted study has all arms of some seeds.

    One worker is this process; more are processes of their own. Progress goes to stderr.
    """
    present = results(study, folder, shared)
    refuse_other_device(present, device)
    tasks = [(name, seed) for seed in study.seeds for name in study.arms if seed not in present[name]]
    for name, _ in tasks:
        load_corpus(study.arms[name], shared, folder / "tokens")
    with Display(study, tasks) as display:
        if workers == 1:
            for name, seed in tasks:
                train_and_save(study.arms[name], name, seed, folder, shared, device, display.update)
        elif tasks:
            _execute_in_processes(study, tasks, folder, shared, device, min(workers, len(tasks)), display)


def train_and_save(
    arm: Arm, name: str, seed: int, folder: Path, shared: Path, device: str, report: Callable[[News], None]
) -> None:
    def news(step: int, loss: float) -> None:
        report((name, seed, step, loss))

    read = inputs(arm, shared)
    result = training.run(arm, seed, shared, folder / "tokens", news, device)
    write_atomically(result_path(folder, name, seed), {"inputs": read, **result})


def _execute_in_processes(
    study: Study, tasks: list[Task], folder: Path, shared: Path, device: str, workers: int, display: "Display"
) -> None:
    context = multiprocessing.get_context("spawn")
    news = context.Queue()
    with ProcessPoolExecutor(workers, context, worker.start, (news,)) as pool:
        waiting: set[Future[None]] = {
            pool.submit(worker.work, train_and_save, study.arms[name], name, seed, folder, shared, device)
            for name, seed in tasks
        }
        try:
            while waiting:
                done, waiting = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
                _drain(news, display.update)
                for future in done:
                    future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        _drain(news, display.update)


def _drain(news: Any, handle: Callable[[News], None]) -> None:
    while True:
        try:
            handle(news.get_nowait())
        except queue.Empty:
            return


class Display:
    """On stderr: steps done and left over all runs, the current loss, and a line for every run that ends."""

    def __init__(self, study: Study, tasks: list[Task]):
        self.study, self.done = study, dict.fromkeys(tasks, 0)
        self.runs, self.all_runs = 0, len(tasks)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
        )
        self.bar = self.progress.add_task(self._description(), total=sum(study.arms[name].steps for name, _ in tasks))

    def __enter__(self) -> "Display":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def _description(self, loss: float | None = None) -> str:
        current = "" if loss is None else f", loss {loss:.3f}"
        return f"{self.runs}/{self.all_runs} runs{current}"

    def update(self, news: News) -> None:
        name, seed, step, loss = news
        self.progress.advance(self.bar, step - self.done[name, seed])
        self.done[name, seed] = step
        if step == self.study.arms[name].steps:
            self.runs += 1
            self.progress.console.print(f"{self.runs}/{self.all_runs} {name}, seed {seed}: training loss {loss:.4f}")
        self.progress.update(self.bar, description=self._description(loss))
