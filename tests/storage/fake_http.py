"""What the fake servers of this folder share: HTTP/1.1 with bytes, failures that a test orders, and a list of requests."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Asked:
    """A request: ``path`` is decoded, ``raw_path`` is not, ``query`` has the first value of each name."""

    method: str
    path: str
    raw_path: str
    query: dict[str, str]
    headers: Mapping[str, str]
    body: bytes


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Refused(Exception):
    """Ends a request with an answer."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


class FakeServer:
    """``with`` it, it answers on a free port with what `decide` returns; each request has a thread of its own."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.failures: list[tuple[str, Answer]] = []  # (part of "METHOD path", answer): the next such request is answered so
        self.lose_answers: list[str] = []  # likewise: carried out, and then the line is cut
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1
            disable_nagle_algorithm = True

            def exchange(self) -> None:
                parts = urlsplit(self.path)
                query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
                headers = {name.lower(): value for name, value in self.headers.items()}
                body = self.rfile.read(int(headers.get("content-length", 0)))
                asked = Asked(self.command, unquote(parts.path), parts.path, query, headers, body)
                what = f"{asked.method} {asked.path}"
                fake.asked.append((asked.method, asked.path))
                try:
                    answer = fake._ordered(what) or fake.decide(asked)
                except Refused as refusal:
                    answer = refusal.answer
                for part in fake.lose_answers:
                    if part in what:
                        fake.lose_answers.remove(part)
                        self.close_connection = True
                        self.connection.shutdown(socket.SHUT_RDWR)
                        return
                self.send_response(answer.status)
                for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = exchange

            def log_message(self, format: str, *args: object) -> None:
                """Tests have better things to print."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 64

            def handle_error(self, request: object, client_address: object) -> None:
                """Clients are killed here: that they hang up is the point."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def _ordered(self, what: str) -> Answer | None:
        for part, answer in self.failures:
            if part in what:
                self.failures.remove((part, answer))
                return answer
        return None

    def decide(self, asked: Asked) -> Answer:
        raise NotImplementedError

    def count(self, part: str) -> int:
        """How many requests so far had this in "METHOD path"."""
        return sum(part in f"{method} {path}" for method, path in self.asked)

    def __enter__(self) -> Any:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
