"""Send small requests of one kind after another, each at a third of what botocore's own way to a request costs.

Of 0.8 ms of processor time for the GetObject of a small file, botocore takes 0.5 to look up the endpoint, to check and
serialize parameters, and to parse the answer: most of a restore of ten thousand small files. Here botocore prepares some
requests in its own way. What they have in common (address, headers, region) is kept; further ones differ in the key, the date,
the checksum and the signature, which botocore's signer makes. Its HTTP sessions send them, with its proxies, certificates and
timeouts.

Whatever is not a plain success (an error, a redirect, refused credentials, an answer that breaks off, a checksum that differs)
goes botocore's own way, with its retries and errors: all requests here can be repeated.
"""

from __future__ import annotations

import base64
import contextlib
import re
import zlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest

MOST_BYTES = 256 << 10  # of a body: larger ones are not worth it
_ORDINARY_ONES = 8  # requests of a kind before those that are made here
_MOST_FAILURES = 16
_SIGNED = re.compile(r"AWS4-HMAC-SHA256 Credential=[^/]+/\d{8}/([^/]+)/s3/aws4_request")
_OWN = frozenset(
    (
        "amz-sdk-invocation-id",
        "amz-sdk-request",
        "authorization",
        "content-length",
        "content-md5",
        "expect",
        "host",
        "x-amz-content-sha256",
        "x-amz-date",
        "x-amz-security-token",
    )
)
_UNUSUAL = frozenset(("content-encoding", "transfer-encoding", "x-amz-s3session-token", "x-amz-trailer"))
_CHECKSUM = "x-amz-checksum-"

_learning: ContextVar[tuple[str, str] | None] = ContextVar("learning", default=None)  # method and key


@dataclass(frozen=True)
class _Pattern:
    """What all requests of a kind have in common.

    Args:
        base: the URL before the key.
        headers: without those that depend on the key, the body or the time.
        region: that the signature names.
        checksum: name of the header with the body's checksum; empty if there is none.
    """

    base: str
    headers: dict[str, str]
    region: str
    checksum: str


class SmallRequests:
    """Gets and puts small objects of one bucket.

    Args:
        clients: those of botocore's to learn from.
        credentials: returns the credentials for a signature.
        send: sends a prepared request, by botocore's HTTP session.
        sums: functions that compute checksums, by the lower-case name of the algorithm.
    """

    def __init__(
        self,
        clients: tuple[Any, ...],
        credentials: Callable[[], Any],
        send: Callable[[Any], Any],
        sums: dict[str, Callable[[bytes], bytes]],
    ) -> None:
        self._credentials = credentials
        self._send = send
        self._sums = {"crc32": lambda body: zlib.crc32(body).to_bytes(4, "big"), **sums}
        self._seen = {"GET": 0, "PUT": 0}
        self._patterns: dict[str, _Pattern] = {}
        self._failures = 0
        for client in clients:
            client.meta.events.register("before-send.s3.GetObject", self._look)
            client.meta.events.register("before-send.s3.PutObject", self._look)

    @contextlib.contextmanager
    def learning(self, method: str, key: str) -> Iterator[None]:
        """Learn from the request for a key that botocore makes in the block."""
        before = _learning.set((method, key))
        try:
            yield
        finally:
            _learning.reset(before)

    def get(self, key: str) -> bytes | None:
        """Return the bytes of an object; None if botocore must be asked for it."""
        answer = self._ask("GET", key, b"")
        return None if answer is None or not self._is_intact(answer) else bytes(answer.content)

    def put(self, key: str, body: bytes) -> bool:
        """Write an object. Return False if botocore must do it."""
        return len(body) <= MOST_BYTES and self._ask("PUT", key, body) is not None

    def _look(self, request: Any, **kwargs: Any) -> None:
        """Keep what a request has in common with others. botocore calls this before each try of a request."""
        told = _learning.get()
        if told is None or told[0] != request.method:
            return
        method, key = told
        self._seen[method] += 1
        if self._seen[method] != _ORDINARY_ONES:
            return
        headers = {name.lower(): _text(value) for name, value in request.headers.items()}
        signed = _SIGNED.match(headers.get("authorization", ""))
        ending = f"/{_quoted(key)}"
        sums = [name for name in headers if name.startswith(_CHECKSUM) and name != f"{_CHECKSUM}mode"]
        known = all(name.removeprefix(_CHECKSUM) in self._sums for name in sums)
        if signed and request.url.endswith(ending) and known and len(sums) <= 1 and not _UNUSUAL & headers.keys():
            common = {name: value for name, value in headers.items() if name not in _OWN and name not in sums}
            base = request.url[: -len(ending) + 1]
            self._patterns[method] = _Pattern(base, common, signed[1], sums[0] if sums else "")

    def _ask(self, method: str, key: str, body: bytes) -> Any:
        """Return the answer to a request, whose body has been read; None if it is not a plain success."""
        pattern = self._patterns.get(method)
        if pattern is None or self._failures >= _MOST_FAILURES:
            return None
        try:
            headers = dict(pattern.headers)
            if pattern.checksum:
                headers[pattern.checksum] = base64.b64encode(
                    self._sums[pattern.checksum.removeprefix(_CHECKSUM)](body)
                ).decode()
            request = AWSRequest(method, pattern.base + _quoted(key), headers, body)
            S3SigV4Auth(self._credentials(), "s3", pattern.region).add_auth(request)
            answer = self._send(request.prepare())
            if answer.status_code == 200:
                answer.content  # noqa: B018  reads it
                return answer
        except Exception:  # botocore will explain it, if it persists
            self._failures += 1
            return None
        if answer.status_code != 404:  # a missing object is no failure of this way
            self._failures += 1
        return None

    def _is_intact(self, answer: Any) -> bool:
        """Return whether the body has the checksum that the server tells; True if it tells none of the body."""
        for name, value in answer.headers.items():
            algorithm = name.lower().removeprefix(_CHECKSUM)
            if algorithm == name.lower() or algorithm == "type" or "-" in value:  # of parts: botocore can't check it either
                continue
            of = self._sums.get(algorithm)
            if of is None or base64.b64encode(of(answer.content)).decode() != value:
                self._failures += 1
                return False
        return True


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("ascii")


def _quoted(key: str) -> str:
    return quote(key, safe="/~")
