"""What the faked metadata services have in common: a real HTTP server, with switches for faults and a list of requests."""

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
    """One request that was answered: ``headers`` have lower-case names."""

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
        port: to listen on; 0 takes a free one.
        hop_limit: how many routers the answer to a PUT may pass, as EC2's ``HttpPutResponseHopLimit``: with 1 it does not get
            into a container behind a bridge. None sets no limit.
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
        """Begins to answer; returns itself."""
        name = type(self).__name__
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name=name, daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stops answering and frees the port."""
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
        """The variables that lead a process to this server."""

    @abstractmethod
    def interrupt(self, in_s: float) -> datetime:
        """Announces that the machine will be taken ``in_s`` seconds from now; returns when."""

    @abstractmethod
    def cancel(self) -> None:
        """Takes back what was announced."""

    # -- what goes wrong ----------------------------------------------------------------------------------------------

    def fail(self, status: int, times: int = 1, body: str = "", headers: Mapping[str, str] | None = None) -> None:
        """Answers the next ``times`` requests with this HTTP status, this text and these headers.

        A ``Location`` makes it a redirect; with ``Connection: close`` and a ``Content-Length`` that is too large the answer
        breaks off.
        """
        with self._lock:
            self._failures += [(status, body, dict(headers or {}))] * times

    def stall(self, seconds: float) -> None:
        """Waits so long before each answer from now on; 0 ends it."""
        with self._lock:
            self._stall_s = seconds

    # -- what was asked -----------------------------------------------------------------------------------------------

    @property
    def requests(self) -> list[Request]:
        """Every request so far, in the order of the answers."""
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
        """The answer, with its headers; called with the lock held."""


class FakeSessionService(FakeService):
    """One that asks for session tokens, as EC2 and Alibaba have it: a token is fetched by PUT with a time to live, an absent,
    unknown or expired one is answered 401, and what is not announced 404.

    Args:
        header: that carries the token.
        host: as for `FakeService`.
        now: the wall clock.
        port: as for `FakeService`.
        hop_limit: likewise.
        clock: seconds, monotonic; tokens expire by it.
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
        """Makes ``path`` below ``/latest/meta-data/``, or a whole path, answer ``body``, whatever that is."""
        self._set(path, lambda: body)

    def expire_tokens(self) -> None:
        """Forgets every session token."""
        with self._lock:
            self._tokens.clear()

    def _set(self, path: str, body: Callable[[], str]) -> None:
        with self._lock:
            self._answers[_whole(path)] = body

    def _forget(self, path: str) -> None:
        with self._lock:
            self._answers.pop(_whole(path), None)

    def _without_token(self) -> int:
        """The status for a request that shows no token; 200 lets it pass."""
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
        said = self._answers.get(_whole(path))
        return (404, "", {}) if said is None else (200, said(), {})


def _whole(path: str) -> str:
    return (path if path.startswith("/") else _METADATA + path).rstrip("/")


def stamp(moment: datetime) -> str:
    """A time as EC2 and Alibaba write it."""
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
        # HTTPServer's own looks up the host's name, which may ask a name server and wait for it.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "localhost", self.server_address[1]

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up after its timeout is expected here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    wbufsize = -1  # one packet an answer

    def _answer(self) -> None:
        assert isinstance(self.server, _Server)
        asked = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        status, body, extra = self.server.respond(self.command, self.path, headers, asked)
        if self.command == "PUT" and self.server.hop_limit is not None:
            inet6 = self.connection.family == socket.AF_INET6
            level, option = (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS) if inet6 else (socket.IPPROTO_IP, socket.IP_TTL)
            self.connection.setsockopt(level, option, self.server.hop_limit)
        content = body.encode()
        self.send_response(status)
        for name, value in {"Content-Type": "text/plain", "Content-Length": str(len(content)), **extra}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST = _answer

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: `FakeService.requests` is the log."""
