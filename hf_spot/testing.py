"""Fakes that the tests, the demo and users share. They are real servers and real stores, with switches for faults.

``python -m hf_spot.testing --interrupt-after 5`` runs `FakeIMDS` on its own and prints the variables that lead to it.
"""

from __future__ import annotations

import argparse
import json
import secrets
import signal
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

from hf_spot.storage.faulty import FaultyStore

__all__ = ["FakeIMDS", "FaultyStore", "Request"]

_TOKEN_PATH = "/latest/api/token"
_METADATA = "/latest/meta-data/"
_ACTION = "spot/instance-action"
_REBALANCE = "events/recommendations/rebalance"


@dataclass(frozen=True)
class Request:
    """One request that `FakeIMDS` answered: ``headers`` have lower-case names."""

    method: str
    path: str
    status: int
    headers: Mapping[str, str] = field(default_factory=dict)


class FakeIMDS:
    """EC2's instance metadata service, version 2, as a real HTTP server on a free port of the loopback interface.

    As strict as the real one: a session token must be fetched by PUT with a time to live, an absent, unknown or expired
    token is answered 401, a request that came through a proxy 403, and what is not announced 404.

    Usable as a context manager; everything may be called from any thread.

    Args:
        host: the address to listen on; one with a colon is IPv6.
        port: to listen on; 0 takes a free one.
        redate: announce the interruption as two minutes (or what `interrupt` said) from each request, as AWS's emulator
            amazon-ec2-metadata-mock does, instead of for one fixed moment.
        metadata: further paths below ``/latest/meta-data/``, or whole ones that begin with a slash, and what they answer.
        hop_limit: how many routers the answer with a session token may pass, as EC2's ``HttpPutResponseHopLimit``: with 1 it
            does not get into a container behind a bridge. None sets no limit.
        now: the wall clock.
        clock: seconds, monotonic; tokens expire by it.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        redate: bool = False,
        metadata: Mapping[str, str] | None = None,
        hop_limit: int | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.redate = redate
        self._answers: dict[str, Callable[[], str]] = {}
        self._now = now
        self._clock = clock
        self._lock = threading.Lock()
        self._tokens: dict[str, float] = {}
        self._requests: list[Request] = []
        self._failures: list[int] = []
        self._stall_s = 0.0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        for path, body in (metadata or {}).items():
            self.answer(path, body)
        self._server = _Server(host, port, self._respond, hop_limit)
        shown = f"[{host}]" if ":" in host else host
        self.endpoint = f"http://{shown}:{self._server.server_address[1]}"

    def start(self) -> FakeIMDS:
        """Begins to answer; returns itself."""
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="FakeIMDS", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stops answering and frees the port."""
        self._stopping.set()
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def __enter__(self) -> FakeIMDS:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop()

    def env(self) -> dict[str, str]:
        """The variables that lead a process to this server."""
        return {"AWS_EC2_METADATA_SERVICE_ENDPOINT": self.endpoint, "AWS_EC2_METADATA_DISABLED": "false"}

    # -- what it announces --------------------------------------------------------------------------------------------

    def interrupt(self, in_s: float = 120, action: str = "terminate") -> datetime:
        """Announces that the instance will be interrupted; returns when.

        Args:
            in_s: seconds from now.
            action: ``terminate``, ``stop`` or ``hibernate``.
        """
        deadline = self._now() + timedelta(seconds=in_s)

        def body() -> str:
            moment = self._now() + timedelta(seconds=in_s) if self.redate else deadline
            return json.dumps({"action": action, "time": _stamp(moment)})

        self._set(_ACTION, body)
        return deadline.replace(microsecond=0)

    def rebalance(self) -> None:
        """Recommends to move away."""
        noticed = self._now()
        self._set(_REBALANCE, lambda: json.dumps({"noticeTime": _stamp(self._now() if self.redate else noticed)}))

    def cancel(self) -> None:
        """Takes back what `interrupt` and `rebalance` announced."""
        with self._lock:
            self._answers.pop(_whole(_ACTION), None)
            self._answers.pop(_whole(_REBALANCE), None)

    def answer(self, path: str, body: str) -> None:
        """Makes ``path`` below ``/latest/meta-data/``, or a whole path, answer ``body``, whatever that is."""
        self._set(path, lambda: body)

    # -- what goes wrong ----------------------------------------------------------------------------------------------

    def fail(self, status: int, times: int = 1) -> None:
        """Answers the next ``times`` requests with this HTTP status."""
        with self._lock:
            self._failures += [status] * times

    def stall(self, seconds: float) -> None:
        """Waits so long before each answer from now on; 0 ends it."""
        with self._lock:
            self._stall_s = seconds

    def expire_tokens(self) -> None:
        """Forgets every session token."""
        with self._lock:
            self._tokens.clear()

    # -- what was asked -----------------------------------------------------------------------------------------------

    @property
    def requests(self) -> list[Request]:
        """Every request so far, in the order of the answers."""
        with self._lock:
            return list(self._requests)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _set(self, path: str, body: Callable[[], str]) -> None:
        with self._lock:
            self._answers[_whole(path)] = body

    def _respond(self, method: str, path: str, headers: Mapping[str, str]) -> tuple[int, str, dict[str, str]]:
        with self._lock:
            stall_s = self._stall_s
        self._stopping.wait(stall_s)
        with self._lock:
            status, body, extra = self._decide(method, path, headers)
            self._requests.append(Request(method, path, status, headers))
        return status, body, extra

    def _decide(self, method: str, path: str, headers: Mapping[str, str]) -> tuple[int, str, dict[str, str]]:
        if self._failures:
            return self._failures.pop(0), "", {}
        if "x-forwarded-for" in headers:
            return 403, "", {}
        if (path == _TOKEN_PATH) != (method == "PUT"):
            return 405, "", {}
        if method == "PUT":
            ttl = headers.get("x-aws-ec2-metadata-token-ttl-seconds", "")
            if not ttl.isdecimal() or not 1 <= int(ttl) <= 21600:
                return 400, "", {}
            token = secrets.token_urlsafe(40)
            self._tokens[token] = self._clock() + int(ttl)
            return 200, token, {"X-aws-ec2-metadata-token-ttl-seconds": ttl}
        expires = self._tokens.get(headers.get("x-aws-ec2-metadata-token", ""), float("-inf"))
        if self._clock() >= expires:
            return 401, "", {}
        body = self._answers.get(_whole(path))
        return (404, "", {}) if body is None else (200, body(), {})


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a thread may be stalled on purpose

    def __init__(
        self,
        host: str,
        port: int,
        respond: Callable[[str, str, Mapping[str, str]], tuple[int, str, dict[str, str]]],
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
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        status, body, extra = self.server.respond(self.command, self.path, headers)
        if self.command == "PUT" and self.server.hop_limit is not None:
            inet6 = self.connection.family == socket.AF_INET6
            level, option = (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS) if inet6 else (socket.IPPROTO_IP, socket.IP_TTL)
            self.connection.setsockopt(level, option, self.server.hop_limit)
        content = body.encode()
        self.send_response(status)
        for name, value in {**extra, "Content-Type": "text/plain", "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST = _answer

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: `FakeIMDS.requests` is the log."""


def _whole(path: str) -> str:
    return (path if path.startswith("/") else _METADATA + path).rstrip("/")


def _stamp(moment: datetime) -> str:
    return moment.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a FakeIMDS until Ctrl-C. SIGUSR1 makes it announce an interruption at once."""
    parser = argparse.ArgumentParser(prog="python -m hf_spot.testing", description="EC2's metadata service, faked.")
    parser.add_argument("--interrupt-after", type=float, metavar="S", help="announce an interruption after S seconds")
    parser.add_argument("--in", dest="in_s", type=float, default=120, metavar="S", help="its notice in seconds (120)")
    arguments = parser.parse_args(argv)
    with FakeIMDS() as imds:
        signal.signal(signal.SIGUSR1, lambda number, frame: imds.interrupt(arguments.in_s))
        print("\n".join(f"export {name}={value}" for name, value in imds.env().items()), flush=True)
        try:
            if arguments.interrupt_after is not None:
                time.sleep(arguments.interrupt_after)
                imds.interrupt(arguments.in_s)
            threading.Event().wait()
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main()
