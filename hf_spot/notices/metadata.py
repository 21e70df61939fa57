"""What the clouds' metadata services share: HTTP without proxies, session tokens, and one notice per announcement, however
often it is repeated."""

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
_TOKEN_TTL_S = 21600  # the maximum of AWS and Alibaba
_RENEW_EARLY_S = 60.0
_WITHOUT_TOKEN_S = 300.0  # until a token is asked for again where none was given: each try may take as long as a timeout


@dataclass(frozen=True)
class Answer:
    """The response of an HTTP server. Names in ``headers`` are case-insensitive."""

    status: int
    body: bytes
    headers: http.client.HTTPMessage


class MetadataService:
    """An HTTP server that is queried directly, never through a proxy named in the environment.

    Args:
        endpoint: ``http://host[:port]``.
        variable: the environment variable that overrides the endpoint, for error messages.
        timeout_s: limit of one attempt for the connection, and then for each part of a response.
        attempts: tries of a request. One is enough for a watcher, which polls again anyway.
        hint: what to try when there is no response.

    Raises:
        ConfigError: the endpoint is not an HTTP URL.
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
        """Send a request, and retry after a failure while attempts are left.

        Args:
            method: HTTP method.
            path: path with its query.
            headers: headers of the request.
            body: body of the request.
            patience_s: additional seconds for the response, once the server is connected.

        Raises:
            SpotError: no response in time.
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
        """Return the response if its status is 200. Raises SpotError."""
        if answer.status != 200:
            raise SpotError(f"{self.where} answered {path} with status {answer.status}", hint=hint)
        return answer

    def json_object(self, body: bytes, path: str) -> dict[str, Any]:
        """Return the JSON object in a response. Raises SpotError."""
        try:
            parsed = json.loads(body)
        except ValueError as error:
            raise SpotError(f"{self.where} answered {path} with something that is not JSON: {body[:200]!r}") from error
        if not isinstance(parsed, dict):
            raise SpotError(f"{self.where} answered {path} with something that is not a JSON object: {body[:200]!r}")
        return parsed

    def _request_once(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None, patience_s: float
    ) -> Answer:
        connection, prefix = self.connect()
        try:
            connection.connect()  # patience_s applies to the response only, not to the connection
            connection.sock.settimeout(self._timeout_s + patience_s)
            connection.request(method, prefix + path, body, dict(headers))
            response = connection.getresponse()
            content = response.read(_LONGEST_ANSWER_BYTES)
            if response.length and len(content) < _LONGEST_ANSWER_BYTES:
                raise http.client.IncompleteRead(content, response.length)  # a truncated time would be a wrong time
            return Answer(response.status, content, response.headers)
        finally:
            connection.close()


class Session:
    """Queries below ``/latest/meta-data/`` with a session token, as on EC2 (IMDSv2) and Alibaba.

    Args:
        service: the service to query.
        header: header that carries the token; with the suffix ``-ttl-seconds``, the header that requests one.
        optional: continue without a token if the service does not support them.
        without_token: called when the service gives no token, but answers without one; None if it must give one.
        forbidden_hint: what to try after a 403.
        clock: monotonic seconds, for the age of the token.
    """

    def __init__(
        self,
        service: MetadataService,
        header: str,
        *,
        optional: bool = False,
        without_token: Callable[[], None] | None = None,
        forbidden_hint: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._service = service
        self._header = header
        self._optional = optional
        self._without_token = without_token
        self._forbidden_hint = forbidden_hint
        self._clock = clock
        self._token = ""
        self._renew_at = float("-inf")

    def ask(self, path: str) -> bytes | None:
        """Return the value of ``path``, or None for 404, which is how these services say "nothing".

        Raises:
            SpotError: no response in time, or another status.
        """
        answer = self._get(path)
        if answer.status == 401:
            # The token can expire early: the clock stood still in hibernation, or the service was restarted.
            self._renew_at = float("-inf")
            answer = self._get(path)
        return None if answer.status == 404 else self._expect_ok(answer, path).body

    def _get(self, path: str) -> Answer:
        try:
            token = self.token()
        except SpotError as refused:
            if self._without_token is None:
                raise
            return self._get_without_token(path, self._without_token, refused)
        headers = {self._header: token} if token else {}
        return self._service.request("GET", f"/latest/meta-data/{path}", headers)

    def _get_without_token(self, path: str, tell: Callable[[], None], refused: SpotError) -> Answer:
        """Ask as the first version of the protocol does. What that can't answer either is the refusal of the token."""
        try:
            answer = self._service.request("GET", f"/latest/meta-data/{path}", {})
        except SpotError:
            raise refused from None
        if answer.status not in (200, 404):
            raise refused
        tell()
        self._token, self._renew_at = "", self._clock() + _WITHOUT_TOKEN_S
        return answer

    def token(self) -> str:
        """Return the session token, renewed if it is about to expire. Raises SpotError."""
        if self._clock() >= self._renew_at:
            asked_at = self._clock()
            answer = self._service.request("PUT", TOKEN_PATH, {f"{self._header}-ttl-seconds": str(_TOKEN_TTL_S)})
            if self._optional and answer.status in (404, 405):
                self._token = ""
            else:
                given = self._expect_ok(answer, TOKEN_PATH).body.strip()
                if not re.fullmatch(rb"[!-~]+", given):
                    raise SpotError(f"{self._service.where} answered with something that is not a session token")
                self._token = given.decode("ascii")
            self._renew_at = asked_at + _TOKEN_TTL_S - _RENEW_EARLY_S
        return self._token

    def _expect_ok(self, answer: Answer, path: str) -> Answer:
        return self._service.expect_ok(answer, path, hint=self._forbidden_hint if answer.status == 403 else "")


class Announcement:
    """The announced end of the machine: while a source keeps announcing it, it is one notice.

    Args:
        source: name of the source.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._key = ""
        self._held: PreemptionNotice | None = None

    def announced(self, key: str, id: str, deadline: datetime | None) -> PreemptionNotice:
        """Return the notice for an end that is announced now.

        Args:
            key: distinguishes one announcement from another.
            id: id of the notice, if this begins a new one.
            deadline: as stated now. The earliest one counts: AWS's own emulator moves it two minutes ahead at every poll,
                and following it would mean a deadline that never comes; real clouds do not postpone.
        """
        if self._held is None or key != self._key:
            self._key = key
            self._held = PreemptionNotice(NoticeKind.TERMINATE, self._source, id, deadline)
        elif deadline is not None and (self._held.deadline is None or deadline < self._held.deadline):
            self._held = replace(self._held, deadline=deadline)
        return self._held

    def withdrawn(self) -> PreemptionNotice | None:
        """Return CANCELLED, once, for an end that is no longer announced; None if there was none."""
        if self._held is None:
            return None
        gone, self._held = self._held, None
        return PreemptionNotice(NoticeKind.CANCELLED, self._source, f"cancelled {gone.id}")


def iso_time(text: object) -> datetime | None:
    """Parse an ISO time. Return None for anything else: an interruption at an unknown time is still an interruption."""
    try:
        # Python 3.10 does not know the suffix Z.
        moment = datetime.fromisoformat(str(text).strip().replace("Z", "+00:00"))
    except ValueError:
        return None
    return moment.astimezone(timezone.utc) if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def stamp(moment: datetime | None) -> str:
    """Format a time as part of a notice's id."""
    return "at an unknown time" if moment is None else moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _connector(endpoint: str, variable: str, timeout_s: float) -> Callable[[], tuple[http.client.HTTPConnection, str]]:
    """Return a function that returns a new connection and the path prefix of every request. http.client uses no proxies."""
    try:
        url = urlsplit(endpoint)
        host, port = url.hostname, url.port
    except ValueError as error:
        raise ConfigError(f"{endpoint!r} is not a URL: {error}", hint=f"{variable}=http://host:port") from error
    classes = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    if url.scheme not in classes or not host:
        raise ConfigError(f"{endpoint!r} is not an http:// URL", hint=f"{variable}=http://host:port")
    return lambda: (classes[url.scheme](host, port, timeout=timeout_s), url.path)
