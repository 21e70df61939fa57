"""A proxy in front of a real S3 server: what does something to a request, or to its answer, is a subclass."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

_HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "content-length"}
_BLOCK_BYTES = 1 << 16


@dataclass(frozen=True)
class Answer:
    """What the server said."""

    status: int
    headers: Mapping[str, str]
    content: bytes


class Exchange:
    """One request, and what becomes of it."""

    def __init__(self, handler: BaseHTTPRequestHandler, upstream: str, arrived: Callable[[int], None]) -> None:
        self._handler = handler
        self._upstream = upstream
        self.method, self.path, self.headers = handler.command, handler.path, handler.headers
        self.body = _body(handler, arrived)

    def forward(self) -> Answer:
        """Has the server carry it out."""
        connection = http.client.HTTPConnection(self._upstream)
        try:
            connection.putrequest(self.method, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self._handler.headers.items():
                if name.lower() not in {"transfer-encoding", "content-length", "connection", "expect"}:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(self.body)))
            connection.endheaders(self.body)
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def answer(self, answer: Answer) -> None:
        """Gives the client an answer."""
        self._begin(answer)
        if self.method != "HEAD":
            self._handler.wfile.write(answer.content)

    def answer_in_part(self, answer: Answer, *, arrives: bool = False) -> None:
        """The first half of an answer, and then nothing more. What a reset overtakes is lost, too, unless it ``arrives``."""
        self._begin(answer)
        self._handler.wfile.write(answer.content[: len(answer.content) // 2])
        self._handler.wfile.flush()
        if arrives:
            self._handler.close_connection = True
        else:
            self.reset()

    def answer_with_a_pause(self, answer: Answer, pause_s: float) -> None:
        """The first half of an answer, silence, and the rest."""
        self._begin(answer)
        half = len(answer.content) // 2
        self._handler.wfile.write(answer.content[:half])
        self._handler.wfile.flush()
        time.sleep(pause_s)
        self._handler.wfile.write(answer.content[half:])

    def refuse(self, status: int, code: str, *, details: str = "", headers: Mapping[str, str] | None = None) -> None:
        """One of S3's errors."""
        content = f"<Error><Code>{code}</Code><Message>injected</Message>{details}</Error>".encode()
        self.answer(Answer(status, {"Content-Type": "application/xml", **(headers or {})}, content))

    @property
    def access_key(self) -> str:
        """The id of the key that signed it."""
        signed = re.search(r"Credential=([^/]+)/", self.headers.get("Authorization", ""))
        return signed[1] if signed else ""

    def reset(self) -> None:
        """The connection breaks."""
        self._handler.close_connection = True
        with contextlib.suppress(OSError):
            self._handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._handler.connection.shutdown(socket.SHUT_RDWR)

    def _begin(self, answer: Answer) -> None:
        self._handler.send_response(answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in _HOP_BY_HOP:
                self._handler.send_header(name, value)
        length = answer.headers["Content-Length"] if self.method == "HEAD" and "Content-Length" in answer.headers else None
        self._handler.send_header("Content-Length", length or str(len(answer.content)))
        self._handler.end_headers()


class Proxy:
    """Forwards everything. ``with`` starts and stops it.

    Args:
        endpoint: of the real server.
        host: address to listen on.
    """

    def __init__(self, endpoint: str, host: str = "127.0.0.1") -> None:
        upstream = urlsplit(endpoint).netloc
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def exchange(self) -> None:
                proxy.carry(Exchange(self, upstream, proxy.arrived))

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = exchange

            def log_message(self, format: str, *args: object) -> None:
                """Tests have better things to print."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, request: object, client_address: object) -> None:
                """Clients are killed here: that they hang up is the point."""

        self._server = Server((host, 0), Handler)
        self.endpoint = f"http://{host}:{self._server.server_port}"

    def arrived(self, count: int) -> None:
        """Called when so many more bytes of a request have arrived; the rest waits until it returns."""

    def carry(self, exchange: Exchange) -> None:
        """What is done with a request."""
        exchange.answer(exchange.forward())

    def __enter__(self) -> Any:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _body(handler: BaseHTTPRequestHandler, arrived: Callable[[int], None]) -> bytes:
    """As it came over the wire: signed chunks stay what they are."""

    def read(size: int) -> bytes:
        blocks = []
        while size and (block := handler.rfile.read(min(size, _BLOCK_BYTES))):
            arrived(len(block))
            blocks.append(block)
            size -= len(block)
        return b"".join(blocks)

    if handler.headers.get("Expect", "").lower() == "100-continue":
        handler.close_connection = False
    if handler.headers.get("Transfer-Encoding", "").lower() != "chunked":
        return read(int(handler.headers.get("Content-Length") or 0))
    parts = []
    while True:
        size = int(handler.rfile.readline().split(b";")[0], 16)
        if size == 0:
            while handler.rfile.readline().strip():
                continue
            return b"".join(parts)
        parts.append(read(size))
        handler.rfile.readline()
