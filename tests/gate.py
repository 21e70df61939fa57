"""A proxy in front of a real S3 server that stops the world at a chosen request: before it is carried out, or after."""

from __future__ import annotations

import http.client
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "content-length"}


class Gate:
    """Forwards everything, until a request matches `close_at`: that one is held for ever, and `reached` is set.

    Args:
        endpoint: of the real server.
        host: address to listen on.
    """

    def __init__(self, endpoint: str, host: str = "127.0.0.1") -> None:
        self._upstream = urlsplit(endpoint).netloc
        self._pattern: re.Pattern[str] | None = None
        self._body = ""
        self._after = False
        self._skip = 0
        self.reached = threading.Event()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        gate = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                gate._answer(self)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

            def log_message(self, format: str, *args: object) -> None:
                """Tests have better things to print."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, request: object, client_address: object) -> None:
                """Clients are killed here: that they hang up is the point."""

        self._server = Server((host, 0), Handler)
        self.endpoint = f"http://{host}:{self._server.server_port}"

    def close_at(self, request: str, *, body: str = "", after: bool = False, skip: int = 0) -> None:
        """Arms the gate.

        Args:
            request: regular expression for ``METHOD /path?query``.
            body: must be found in the request's body too.
            after: hold the answer of the request, and not the request.
            skip: so many matching requests pass first.
        """
        self.reached.clear()
        with self._lock:
            self._pattern, self._body, self._after, self._skip = re.compile(request), body, after, skip

    def open(self) -> None:
        """Lets everything pass that comes from now on."""
        with self._lock:
            self._pattern = None

    def _holds(self, request: str, body: bytes) -> bool:
        with self._lock:
            if self._pattern is None or not self._pattern.search(request) or self._body.encode() not in body:
                return False
            if self._skip:
                self._skip -= 1
                return False
            return True

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = _body(handler)
        held = self._holds(f"{handler.command} {handler.path}", body)
        if held and not self._after:
            self.reached.set()
            self._stopped.wait()
            return
        upstream = http.client.HTTPConnection(self._upstream)
        try:
            status, headers, content = _forward(upstream, handler, body)
        finally:
            upstream.close()
        if held:
            self.reached.set()
            self._stopped.wait()
            return
        handler.send_response(status)
        for name, value in headers.items():
            if name.lower() not in _HOP_BY_HOP:
                handler.send_header(name, value)
        handler.send_header("Content-Length", headers["Content-Length"] if handler.command == "HEAD" else str(len(content)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(content)

    def __enter__(self) -> Gate:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()


def _body(handler: BaseHTTPRequestHandler) -> bytes:
    """As it came over the wire: signed chunks stay what they are."""
    if handler.headers.get("Expect", "").lower() == "100-continue":
        handler.close_connection = False
    if handler.headers.get("Transfer-Encoding", "").lower() != "chunked":
        return handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
    parts = []
    while True:
        size = int(handler.rfile.readline().split(b";")[0], 16)
        if size == 0:
            while handler.rfile.readline().strip():
                continue
            return b"".join(parts)
        parts.append(handler.rfile.read(size))
        handler.rfile.readline()


def _forward(
    upstream: http.client.HTTPConnection, handler: BaseHTTPRequestHandler, body: bytes
) -> tuple[int, Mapping[str, str], bytes]:
    upstream.putrequest(handler.command, handler.path, skip_host=True, skip_accept_encoding=True)
    for name, value in handler.headers.items():
        if name.lower() not in {"transfer-encoding", "content-length", "connection", "expect"}:
            upstream.putheader(name, value)
    upstream.putheader("Content-Length", str(len(body)))
    upstream.endheaders(body)
    response = upstream.getresponse()
    return response.status, response.headers, response.read()
