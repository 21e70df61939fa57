"""What the metadata services of the clouds have in common: HTTP without proxies, session tokens, and one notice for what is
announced again and again."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any
from urllib.parse import urlsplit

from hf_spot.errors import ConfigError, SpotError
from hf_spot.notices.notice import NoticeKind, PreemptionNotice

_LONGEST_ANSWER_BYTES = 65536
TOKEN_PATH = "/latest/api/token"
_TOKEN_TTL_S = 21600  # the longest that AWS and Alibaba grant
_RENEW_EARLY_S = 60.0


@dataclass(frozen=True)
class Answer:
    """Of an HTTP server. ``headers`` finds a name in whatever case."""

    status: int
    body: bytes
    headers: http.client.HTTPMessage


class MetadataService:
    """An HTTP server that is asked directly: a proxy named in the environment is never used.

    Args:
        endpoint: ``http://host[:port]``.
        variable: the environment variable that names another endpoint, for error messages.
        timeout_s: how long one attempt waits for the connection, and then for each part of an answer.
        attempts: how often a request is tried. One is enough for a watcher, which polls again anyway.
        hint: what to try when there is no answer.

    Raises:
        ConfigError: the endpoint is no HTTP URL.
    """

    def __init__(self, endpoint: str, variable: str, *, timeout_s: float, attempts: int = 1, hint: str = "") -> None:
        self.where = endpoint.rstrip("/")
        self._timeout_s = timeout_s
        self._attempts = attempts
        self._hint = hint
        self.connect = _connector(self.where, variable, timeout_s)

    def request(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None, *, patience_s: float = 0.0
    ) -> Answer:
        """Asks, and asks again after trouble while attempts are left.

        Args:
            method: of HTTP.
            path: with its query.
            headers: of the request.
            body: of the request.
            patience_s: how much longer than usual a server that is there may think about its answer.

        Raises:
            SpotError: no answer in time.
        """
        for left in reversed(range(self._attempts)):
            try:
                answer = self._request_once(method, path, headers, body, patience_s)
            except (OSError, http.client.HTTPException) as error:
                if left:
                    continue
                raise SpotError(
                    f"no answer from {self.where} in {self._timeout_s + patience_s:g} s: {error or type(error).__name__}",
                    hint=self._hint,
                ) from error
            if answer.status < 500 or not left:
                return answer
        raise AssertionError("unreachable: there is at least one attempt")

    def expect_ok(self, answer: Answer, path: str, *, hint: str = "") -> Answer:
        """The answer, if its status is 200. Raises SpotError."""
        if answer.status != 200:
            raise SpotError(f"{self.where} answered {path} with status {answer.status}", hint=hint)
        return answer

    def json_object(self, body: bytes, path: str) -> dict[str, Any]:
        """The JSON object in an answer. Raises SpotError."""
        try:
            said = json.loads(body)
        except ValueError as error:
            raise SpotError(f"{self.where} answered {path} with something that is no JSON: {body[:200]!r}") from error
        if not isinstance(said, dict):
            raise SpotError(f"{self.where} answered {path} with something that is no JSON object: {body[:200]!r}")
        return said

    def _request_once(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None, patience_s: float
    ) -> Answer:
        connection, prefix = self.connect()
        try:
            connection.connect()  # nobody waits patiently for a server that is not there
            connection.sock.settimeout(self._timeout_s + patience_s)
            connection.request(method, prefix + path, body, dict(headers))
            response = connection.getresponse()
            said = response.read(_LONGEST_ANSWER_BYTES)
            if response.length and len(said) < _LONGEST_ANSWER_BYTES:
                raise http.client.IncompleteRead(said, response.length)  # half a time is another time
            return Answer(response.status, said, response.headers)
        finally:
            connection.close()


class Session:
    """Asks below ``/latest/meta-data/`` with a session token, as EC2 (IMDSv2) and Alibaba have it.

    Args:
        service: that is asked.
        header: which carries the token; with ``-ttl-seconds`` behind it, the one that asks for a token.
        optional: go on without a token where the service knows none.
        forbidden_hint: what to try after a 403.
        clock: seconds, monotonic; the age of the token is measured with it.
    """

    def __init__(
        self,
        service: MetadataService,
        header: str,
        *,
        optional: bool = False,
        forbidden_hint: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._service = service
        self._header = header
        self._optional = optional
        self._forbidden_hint = forbidden_hint
        self._clock = clock
        self._token = ""
        self._renew_at = float("-inf")

    def ask(self, path: str) -> bytes | None:
        """What stands under ``path``; None for 404, which is how these services say "nothing".

        Raises:
            SpotError: no answer in time, or another status.
        """
        answer = self._get(path)
        if answer.status == 401:
            # The token can die before its time: the clock stood still in hibernation, or the service was restarted.
            self._renew_at = float("-inf")
            answer = self._get(path)
        return None if answer.status == 404 else self._expect_ok(answer, path).body

    def _get(self, path: str) -> Answer:
        token = self.token()
        headers = {self._header: token} if token else {}
        return self._service.request("GET", f"/latest/meta-data/{path}", headers)

    def token(self) -> str:
        """The token of the session, a new one when the old one is about to end. Raises SpotError."""
        if self._clock() >= self._renew_at:
            asked_at = self._clock()
            answer = self._service.request("PUT", TOKEN_PATH, {f"{self._header}-ttl-seconds": str(_TOKEN_TTL_S)})
            if self._optional and answer.status in (404, 405):
                self._token = ""
            else:
                given = self._expect_ok(answer, TOKEN_PATH).body.strip()
                if not re.fullmatch(rb"[!-~]+", given):
                    raise SpotError(f"{self._service.where} gave something that is no session token")
                self._token = given.decode("ascii")
            self._renew_at = asked_at + _TOKEN_TTL_S - _RENEW_EARLY_S
        return self._token

    def _expect_ok(self, answer: Answer, path: str) -> Answer:
        return self._service.expect_ok(answer, path, hint=self._forbidden_hint if answer.status == 403 else "")


class Announcement:
    """The end of the machine as a source has heard it: one unbroken announcement is one notice.

    Args:
        source: name of the source.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._key = ""
        self._held: PreemptionNotice | None = None

    def heard(self, key: str, id: str, deadline: datetime | None) -> PreemptionNotice:
        """It is announced now.

        Args:
            key: tells one announcement from another.
            id: of the notice, if this begins one.
            deadline: as stated now. AWS's own emulator moves it two minutes ahead of every poll, and following it would
                make it one that never comes; clouds themselves do not postpone. Of several the earliest is the one that it
                is safe to be ready for.
        """
        if self._held is None or key != self._key:
            self._key = key
            self._held = PreemptionNotice(NoticeKind.TERMINATE, self._source, id, deadline)
        elif deadline is not None and (self._held.deadline is None or deadline < self._held.deadline):
            self._held = replace(self._held, deadline=deadline)
        return self._held

    def silent(self) -> PreemptionNotice | None:
        """It is not announced now: CANCELLED, once, if it was before."""
        if self._held is None:
            return None
        gone, self._held = self._held, None
        return PreemptionNotice(NoticeKind.CANCELLED, self._source, f"cancelled {gone.id}")


def iso_time(text: object) -> datetime | None:
    """An ISO time, or None for anything else: an interruption at an unknown time is still one."""
    try:
        # Python 3.10 does not know the suffix Z.
        moment = datetime.fromisoformat(str(text).strip().replace("Z", "+00:00"))
    except ValueError:
        return None
    return moment.astimezone(timezone.utc) if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def stamp(moment: datetime | None) -> str:
    """A time as part of a notice's id."""
    return "at an unknown time" if moment is None else moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _connector(endpoint: str, variable: str, timeout_s: float) -> Callable[[], tuple[http.client.HTTPConnection, str]]:
    """Makes a connection and the path that goes before every request's. http.client knows of no proxies."""
    try:
        url = urlsplit(endpoint)
        host, port = url.hostname, url.port
    except ValueError as error:
        raise ConfigError(f"{endpoint!r} is no URL: {error}", hint=f"{variable}=http://host:port") from error
    classes = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    if url.scheme not in classes or not host:
        raise ConfigError(f"{endpoint!r} is no http:// URL", hint=f"{variable}=http://host:port")
    return lambda: (classes[url.scheme](host, port, timeout=timeout_s), url.path)
