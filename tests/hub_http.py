"""The test Hub's way of answering: which method handles a request, and what may go wrong on the way."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Fault:
    """Something that goes wrong with the next `times` requests that match.

    `what`: a status to answer with, "drop" (cut the connection in the middle of the body), "lose" (do it, then cut the
    connection instead of answering), or a function that is called with the request before it is handled.
    """

    method: str
    path: str
    what: int | str | Callable
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


class Handler(BaseHTTPRequestHandler):
    hub: Any
    protocol_version = "HTTP/1.1"

    def _dispatch(self):
        quoted = urlsplit(self.path).path
        self.hub.requests.append((self.command, unquote(quoted)))
        self.losing = False
        fault = self._next_fault(quoted)
        if fault is not None and fault.what == "drop":
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            return self._cut()
        self.body = self._read(int(self.headers.get("Content-Length") or 0))
        if fault is not None:
            if isinstance(fault.what, int):
                return self.answer(fault.what, b"", fault.headers)
            if callable(fault.what):
                fault.what(self)
            self.losing = fault.what == "lose"
        for pattern, name in self.hub.routes:
            match = pattern.match(quoted)
            method = getattr(self.hub, f"on_{self.command}_{name}", None)
            if match and method:
                groups = {key: value and unquote(value) for key, value in match.groupdict().items()}
                if groups.pop("kind", "models") == "datasets":
                    groups["repo"] = f"datasets/{groups['repo']}"
                if groups.get("repo") in self.hub.broken:
                    return self.refuse(self.hub.broken[groups["repo"]], "")
                return method(self, **groups)
        return self.answer_json(404, {"error": f"no route for {self.command} {quoted}"})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _dispatch

    def _next_fault(self, path: str) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times > 0 and fault.method == self.command and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def _read(self, length: int) -> bytes:
        if not self.hub.bytes_per_second:
            return self.rfile.read(length)
        body = b""
        while len(body) < length:
            block = self.rfile.read(min(1 << 16, length - len(body)))
            time.sleep(len(block) / self.hub.bytes_per_second)
            body += block
        return body

    def _cut(self):
        self.close_connection = True
        self.connection.close()

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None):
        if self.losing:
            return self._cut()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, status: int, value):
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str):
        self.answer(status, b"", {"X-Error-Code": code, "X-Error-Message": code} if code else {})

    def handle(self):
        with contextlib.suppress(ConnectionError, ValueError):  # the other side hung up, or a fault did
            super().handle()

    def finish(self):
        with contextlib.suppress(ConnectionError, ValueError):
            super().finish()

    def log_message(self, *_):
        pass
