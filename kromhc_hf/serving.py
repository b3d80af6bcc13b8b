"""transformers' own server, in a process that knows models with hyper-connections."""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout


def serve(arguments: Sequence[str]) -> None:
    """Runs `transformers serve`; what it logs goes to stderr.

    Args:
        arguments: those of `transformers serve`, such as the model and `--port`.

    Raises:
        ValueError: if packages that the server needs are missing, naming them.
    """
    try:
        from transformers.cli.transformers import app

        with redirect_stdout(sys.stderr):
            app(["serve", *arguments], standalone_mode=False)
    except ImportError as error:
        raise ValueError(
            "serving needs fastapi, uvicorn, pydantic and openai, of which some are missing. "
            f"Use pip install 'transformers[serving]'. ({error})"
        ) from error
