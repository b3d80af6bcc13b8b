"""A request handler that is given its addresses as a table, and errors as the Hub words them."""

import json
import re
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit


class Problem(Exception):
    """Ends the request with an error."""

    def __init__(self, status: int, code: str, message: str, **headers: str):
        self.status, self.message = status, message
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, **headers}


class RoutedHandler(BaseHTTPRequestHandler):
    """Answers a request by the first of its routes that fits, with the parts of the address as arguments.

    Attributes:
        ROUTES: method (GET for HEAD as well), pattern of the whole path, and the name of the function that answers.
    """

    protocol_version = "HTTP/1.1"
    ROUTES: list[tuple[str, str, str]] = []

    def handle_any(self) -> None:
        path = urlsplit(self.path).path
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for verb, pattern, name in self.ROUTES:
                found = re.fullmatch(pattern, path)
                if verb == method and found:
                    arguments = {key: unquote(value) for key, value in found.groupdict().items()}
                    getattr(self, name)(**arguments)
                    return
            raise Problem(404, "NotFound", f"no such address: {self.command} {path}")
        except Problem as problem:
            # What the request still has to say must not be taken for the next request.
            self.rfile.read(int(self.headers.get("Content-Length", 0)) if not hasattr(self, "body_read") else 0)
            self.answer({"error": problem.message}, problem.status, problem.headers)
        finally:
            vars(self).pop("body_read", None)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def log_message(self, *_) -> None:
        pass

    def body(self) -> bytes:
        self.body_read = True
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
