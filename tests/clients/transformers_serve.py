"""transformers' own server: a chat completion over 127.0.0.1, by `kromhc serve`."""

import json
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from clients.client import Check, Client, Models, same


SECONDS = 300
MESSAGES = [{"role": "user", "content": "Once upon a time"}]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def answer(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = Request(url, data, {"Content-Type": "application/json"})
    with urlopen(request, timeout=SECONDS) as response:
        return json.loads(response.read())


def completion(words: list[str], model: Path, work: Path) -> str:
    """What a server that is started by these words says to the messages, greedily; and that its stdout is empty."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with (work / "out").open("w") as out, (work / "err").open("w") as err:
        server = subprocess.Popen([*words, "--host", "127.0.0.1", "--port", str(port)], stdout=out, stderr=err)
        try:
            for _ in range(SECONDS):
                if server.poll() is not None:
                    raise RuntimeError((work / "err").read_text()[-2000:])
                with suppress(URLError):
                    answer(f"{url}/health")
                    break
                time.sleep(1)
            body = {"model": str(model), "messages": MESSAGES, "temperature": 0, "max_tokens": 24, "stream": False}
            said = answer(f"{url}/v1/chat/completions", body)["choices"][0]["message"]["content"]
        except HTTPError as error:
            raise RuntimeError(f"{error}: {(work / 'err').read_text()[-1000:]}") from error
        finally:
            server.terminate()
            server.wait(60)
    return said


def by_our_command(models: Models, work: Path) -> str:
    said = completion(["kromhc", "serve", str(models.start)], models.start, work)
    assert said
    assert (work / "out").read_text() == "", "it prints on stdout"
    return said


CLIENT = Client(
    tool="transformers serve",
    requirements=("transformers[serving]==5.24.0",),
    use="`kromhc serve MODEL` takes the options of `transformers serve`, which imports nothing of this package. "
    "See [serve a model](how-to/serve.md).",
    checks=(Check("`kromhc serve MODEL`: a greedy chat completion over 127.0.0.1", by_our_command, same),),
)
