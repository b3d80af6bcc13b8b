"""What a process of a study begins with. It imports little, so that it is quiet before torch is imported."""

from collections.abc import Callable
from typing import Any

from ..quiet import quiet


# The queue to the process that shows progress.
_news: Any = None


def start(news: Any) -> None:
    """The first call in the process."""
    global _news
    quiet()
    _news = news


def work(run: Callable[..., None], *arguments: Any) -> None:
    """Calls `run` with the arguments and with what takes its news."""
    run(*arguments, _news.put)
