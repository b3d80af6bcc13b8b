"""Copies of this process, to be killed in the middle of something: what they need is imported there already."""

import os
import traceback
from collections.abc import Callable


def fork(function: Callable[[], object]) -> int:
    """The id of a copy of this process, which calls a function and ends."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def exit_code(child: int) -> int:
    """Of such a copy, once it has ended; less than 0 if it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
