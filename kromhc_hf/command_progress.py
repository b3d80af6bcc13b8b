"""What a command shows while it works: each part as it begins, and what it took when it is done."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import DownloadColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class PartsWithTimes:
    """A line for each part of a command, with its seconds; for the part that copies, bytes as well.

    On a terminal the present part has its time running; elsewhere there are the lines of the finished ones alone.
    """

    def __init__(self, console: Console):
        columns = (SpinnerColumn(), TextColumn("{task.description}"), DownloadColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=console, transient=True)
        self.name, self.since, self.task = "", 0.0, TaskID(0)

    def __enter__(self) -> "PartsWithTimes":
        if self.progress.console.is_interactive:
            self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            self._end()
        if self.progress.console.is_interactive:
            self.progress.stop()

    def begin(self, name: str) -> None:
        """The part before is over, another one begins."""
        self._end()
        self.name, self.since = name, time.perf_counter()
        self.task = self.progress.add_task(name, total=None)

    def bytes_done(self, done: int, total: int) -> None:
        """How far the present part is."""
        self.progress.update(self.task, completed=done, total=total)

    def _end(self) -> None:
        if self.name:
            seconds = time.perf_counter() - self.since
            self.progress.remove_task(self.task)
            self.progress.console.print(f"{self.name}: {seconds:.1f} s", highlight=False)
        self.name = ""
