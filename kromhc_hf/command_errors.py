"""How a command ends when something goes wrong: with one message and an exit code, and no traceback.

0 is success, 1 means that a check failed and nothing else, 2 that something could not be done, 130 that the user
stopped it, 141 that whoever read the output went away.
"""

import os
import sys
import traceback
from pathlib import Path
from typing import Any

from rich.console import Console
from typer import Abort
from typer.core import TyperGroup


BAD_INPUT, INTERRUPTED, CLOSED_PIPE = 2, 130, 141
# Set to anything, it has the traceback shown above the message.
TRACEBACK = "KROMHC_TRACEBACK"


class PipedConsole(Console):
    """A console that leaves a closed pipe to whoever decides about exit codes."""

    def on_broken_pipe(self) -> None:
        raise  # what rich is handling


class ErrorsAsMessages(TyperGroup):
    """Commands whose every exception becomes a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        except BrokenPipeError:
            # What is left in the buffer is flushed at the very end, where nobody could catch the next error.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(CLOSED_PIPE)
        except Exception as error:
            # Those of the command line itself know how to end.
            if isinstance(error, Abort) or hasattr(error, "exit_code"):
                raise
            if os.environ.get(TRACEBACK):
                traceback.print_exc()
            console = Console(stderr=True)
            console.print(f"error: {explain(error)}", style="red", markup=False, highlight=False, soft_wrap=True)
            sys.exit(BAD_INPUT)


def explain(error: Exception) -> str:
    """What to say about an exception: our own messages as they are, those of libraries in one line with their type."""
    if isinstance(error, OSError) and error.strerror:
        # Without the number, which nobody knows.
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, ValueError | OSError):
        return str(error) or type(error).__name__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' * bool(text)}{text} ({TRACEBACK}=1 shows where it comes from)"


def read_text(path: Path | None) -> str | None:
    """The text in a file that an option names; None without one.

    Raises:
        ValueError: naming the file, if it cannot be read or has no text in it.
    """
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ValueError(f"--text must name a file of UTF-8 text; {path} cannot be read ({reason}).") from error
    if not text.strip():
        raise ValueError(f"--text must name a file with text in it; {path} is empty. Leave it out for a short story.")
    return text
