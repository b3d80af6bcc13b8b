"""transformers' own server, in a process that knows models with hyper-connections."""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout


def serve(arguments: Sequence[str]) -> None:
    """Runs `transformers serve`; what it logs goes to stderr.

    Args:
        arguments: those of `transformers serve`, such as the model and `--port`.

    Raises:
        ValueError: if packages that the server needs are missing, naming them, or an argument is wrong.
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
    except Exception as error:
        # Of click, which typer knows only where it has none inside.
        if not hasattr(error, "format_message"):
            raise
        raise ValueError(f"transformers serve: {error.format_message()}") from error
