"""The base of the fake metadata services: a real HTTP server that can inject faults and records its requests."""

from __future__ import annotations

import secrets
import socket
import socketserver
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import TypeVar

Response = tuple[int, str, dict[str, str]]
Self = TypeVar("Self", bound="FakeService")

_TOKEN_PATH = "/latest/api/token"
_METADATA = "/latest/meta-data/"


@dataclass(frozen=True)
class Request:
    """One answered request; ``headers`` have lower-case names."""

    method: str
    path: str
    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


class FakeService(ABC):
    """A metadata service as a real HTTP server on a free port of the loopback interface.

    Usable as a context manager; everything may be called from any thread.

    Args:
        host: the address to listen on; one with a colon is IPv6.
        port: the port to listen on; 0 for any free one.
        hop_limit: hop limit of the response to a PUT, as EC2's ``HttpPutResponseHopLimit``: with 1 it does not reach a
            container behind a bridge. None for no limit.
        now: the wall clock.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        hop_limit: int | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
    ) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._requests: list[Request] = []
        self._failures: list[Response] = []
        self._stall_s = 0.0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._server = _Server(host, port, self._respond, hop_limit)
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{self._server.server_address[1]}"
        self.endpoint = f"http://{self.address}"

    def start(self: Self) -> Self:
        """Start answering. Return this service."""
        name = type(self).__name__
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name=name, daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop answering and free the port."""
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def __enter__(self: Self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop()

    @abstractmethod
    def env(self) -> dict[str, str]:
        """Return the variables that point a process to this server."""

    @abstractmethod
    def interrupt(self, in_s: float) -> datetime:
        """Announce that the machine will be taken away ``in_s`` seconds from now. Return that time."""

    @abstractmethod
    def cancel(self) -> None:
        """Withdraw the announcement."""

    # -- faults -------------------------------------------------------------------------------------------------------

    def fail(self, status: int, times: int = 1, body: str = "", headers: Mapping[str, str] | None = None) -> None:
        """Answer the next ``times`` requests with this HTTP status, body and headers.

        A ``Location`` makes it a redirect; with ``Connection: close`` and a ``Content-Length`` that is too large the response
        is truncated.
        """
        with self._lock:
            self._failures += [(status, body, dict(headers or {}))] * times

    def stall(self, seconds: float) -> None:
        """Delay each response by some seconds from now on; 0 ends the delay."""
        with self._lock:
            self._stall_s = seconds

    # -- requests -----------------------------------------------------------------------------------------------------

    @property
    def requests(self) -> list[Request]:
        """Return every request so far, in the order of the responses."""
        with self._lock:
            return list(self._requests)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _respond(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Response:
        with self._lock:
            stall_s = self._stall_s
        self._stopping.wait(stall_s)
        with self._lock:
            status, text, extra = self._failures.pop(0) if self._failures else self._decide(method, path, headers, body)
            self._requests.append(Request(method, path, status, headers, body))
        return status, text, extra

    @abstractmethod
    def _decide(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Response:
        """Return the response to a request; called with the lock held."""


class FakeSessionService(FakeService):
    """A service with session tokens, like those of EC2 and Alibaba: a token is fetched by PUT with a time to live, a missing,
    unknown or expired one gives 401, and a path without an announcement 404.

    Args:
        header: header that carries the token.
        host: as for `FakeService`.
        now: the wall clock.
        port: as for `FakeService`.
        hop_limit: as for `FakeService`.
        clock: monotonic seconds, for the expiry of tokens.
    """

    def __init__(
        self,
        header: str,
        *,
        host: str,
        now: Callable[[], datetime],
        port: int = 0,
        hop_limit: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._header = header
        self._clock = clock
        self._tokens: dict[str, float] = {}
        self._answers: dict[str, Callable[[], str]] = {}
        super().__init__(host=host, port=port, hop_limit=hop_limit, now=now)

    def answer(self, path: str, body: str) -> None:
        """Set the response of ``path`` below ``/latest/meta-data/``, or of an absolute path. It may be invalid."""
        self._set(path, lambda: body)

    def expire_tokens(self) -> None:
        """Invalidate every session token."""
        with self._lock:
            self._tokens.clear()

    def _set(self, path: str, body: Callable[[], str]) -> None:
        with self._lock:
            self._answers[_absolute(path)] = body

    def _forget(self, path: str) -> None:
        with self._lock:
            self._answers.pop(_absolute(path), None)

    def _without_token(self) -> int:
        """Return the status for a request without a token; 200 accepts it."""
        return 401

    def _decide(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Response:
        if "x-forwarded-for" in headers:
            return 403, "", {}
        if (path == _TOKEN_PATH) != (method == "PUT"):
            return 405, "", {}
        if method == "PUT":
            ttl = headers.get(f"{self._header}-ttl-seconds".lower(), "")
            if not ttl.isdecimal() or not 1 <= int(ttl) <= 21600:
                return 400, "", {}
            token = secrets.token_urlsafe(40)
            self._tokens[token] = self._clock() + int(ttl)
            return 200, token, {f"{self._header}-ttl-seconds": ttl}
        token = headers.get(self._header.lower(), "")
        status = 200 if self._clock() < self._tokens.get(token, float("-inf")) else 401
        if not token:
            status = self._without_token()
        if status != 200:
            return status, "", {}
        found = self._answers.get(_absolute(path))
        return (404, "", {}) if found is None else (200, found(), {})


def _absolute(path: str) -> str:
    return (path if path.startswith("/") else _METADATA + path).rstrip("/")


def stamp(moment: datetime) -> str:
    """Format a time as EC2 and Alibaba do."""
    return moment.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a thread may be stalled on purpose

    def __init__(
        self,
        host: str,
        port: int,
        respond: Callable[[str, str, Mapping[str, str], bytes], Response],
        hop_limit: int | None,
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.respond = respond
        self.hop_limit = hop_limit
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        # HTTPServer's own method looks up the host's name, which may wait for a DNS server.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "localhost", self.server_address[1]

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that close the connection after their timeout."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    wbufsize = -1  # one packet per response

    def _answer(self) -> None:
        assert isinstance(self.server, _Server)
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        status, body, extra = self.server.respond(self.command, self.path, headers, content)
        if self.command == "PUT" and self.server.hop_limit is not None:
            inet6 = self.connection.family == socket.AF_INET6
            level, option = (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS) if inet6 else (socket.IPPROTO_IP, socket.IP_TTL)
            self.connection.setsockopt(level, option, self.server.hop_limit)
        answer = body.encode()
        self.send_response(status)
        for name, value in {"Content-Type": "text/plain", "Content-Length": str(len(answer)), **extra}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PUT = do_POST = _answer

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: `FakeService.requests` is the log."""
