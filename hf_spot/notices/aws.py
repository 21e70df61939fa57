"""EC2 says on its metadata service (IMDSv2) that a spot instance will be interrupted, and sometimes that it may be."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any
from urllib.parse import urlsplit

from hf_spot.errors import ConfigError, SpotError
from hf_spot.notices.notice import NoticeKind, PreemptionNotice

ENDPOINT_VARIABLE = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
MODE_VARIABLE = "AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE"
DISABLED_VARIABLE = "AWS_EC2_METADATA_DISABLED"
TIMEOUT_VARIABLE = "AWS_METADATA_SERVICE_TIMEOUT"
ATTEMPTS_VARIABLE = "AWS_METADATA_SERVICE_NUM_ATTEMPTS"

_ENDPOINTS = {"ipv4": "http://169.254.169.254", "ipv6": "http://[fd00:ec2::254]"}
_TOKEN_PATH = "/latest/api/token"
_TOKEN_HEADER = "X-aws-ec2-metadata-token"
_TTL_HEADER = "X-aws-ec2-metadata-token-ttl-seconds"
_TOKEN_TTL_S = 21600  # the longest that AWS grants
_RENEW_EARLY_S = 60.0
_LONGEST_ANSWER_BYTES = 65536


def is_disabled(environ: Mapping[str, str]) -> bool:
    """True when the environment forbids to ask the metadata service."""
    return environ.get(DISABLED_VARIABLE, "").strip().lower() == "true"


class IMDSSource:
    """The instance metadata service of EC2, asked directly: a proxy named in the environment is never used.

    Args:
        endpoint: ``http://host[:port]``.
        timeout_s: how long one attempt waits for each part of an answer.
        attempts: how often a request is tried within one poll. One is enough for a watcher, which polls again anyway.
        interval_s: seconds between polls; AWS asks for 5 or fewer.
        clock: seconds, monotonic; the age of the session token is measured with it.

    Raises:
        ConfigError: the endpoint is no HTTP URL, or a number is out of range.
    """

    name = "imds"

    def __init__(
        self,
        endpoint: str = _ENDPOINTS["ipv4"],
        *,
        timeout_s: float = 1.0,
        attempts: int = 1,
        interval_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.where = endpoint.rstrip("/")
        self.interval_s = interval_s
        self._connect = _connector(self.where, timeout_s)
        if not timeout_s > 0 or attempts < 1:
            raise ConfigError(
                f"the metadata service can't be asked {attempts} times with a timeout of {timeout_s} s",
                hint=f"at least one attempt, more than 0 seconds: {ATTEMPTS_VARIABLE}=1 {TIMEOUT_VARIABLE}=1",
            )
        self._timeout_s = timeout_s
        self._attempts = attempts
        self._clock = clock
        self._token = ""
        self._renew_at = float("-inf")
        self._action = ""
        self._interruption: PreemptionNotice | None = None
        self._recommendation: PreemptionNotice | None = None

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> IMDSSource:
        """The source as the variables that the AWS SDKs know describe it.

        Raises:
            ConfigError: the metadata service is disabled, or a variable has a value that can't be used.
        """
        if is_disabled(environ):
            raise ConfigError(
                f"{DISABLED_VARIABLE}=true forbids to ask the metadata service of EC2",
                hint=f"unset {DISABLED_VARIABLE}, or leave imds out of --notice",
            )
        mode = environ.get(MODE_VARIABLE, "").strip().lower() or "ipv4"
        if mode not in _ENDPOINTS:
            raise ConfigError(
                f"{MODE_VARIABLE}={environ[MODE_VARIABLE]!r} is neither IPv4 nor IPv6", hint=f"{MODE_VARIABLE}=IPv4"
            )
        try:
            timeout_s = float(environ.get(TIMEOUT_VARIABLE) or 1)
            attempts = int(environ.get(ATTEMPTS_VARIABLE) or 1)
        except ValueError as error:
            raise ConfigError(
                f"{TIMEOUT_VARIABLE} and {ATTEMPTS_VARIABLE} must be numbers: {error}",
                hint=f"{TIMEOUT_VARIABLE}=1 {ATTEMPTS_VARIABLE}=1",
            ) from error
        endpoint = environ.get(ENDPOINT_VARIABLE) or _ENDPOINTS[mode]
        return cls(endpoint, timeout_s=timeout_s, attempts=attempts)

    def poll(self) -> PreemptionNotice | None:
        """What the metadata service says now.

        TERMINATE: an interruption is scheduled (terminate, stop or hibernate; hibernation begins at once, so its
        deadline may be past). ADVISORY: a rebalance is recommended. CANCELLED, once: a scheduled interruption is no
        longer announced.

        Raises:
            SpotError: no answer in time, or one that makes no sense.
        """
        said = self._ask("spot/instance-action")
        if said is not None:
            self._interruption = self._interrupted(said)
            return self._interruption
        if self._interruption is not None:
            gone, self._interruption = self._interruption, None
            return PreemptionNotice(NoticeKind.CANCELLED, self.name, f"cancelled {gone.id}")
        said = self._ask("events/recommendations/rebalance")
        if said is None:
            self._recommendation = None
        elif self._recommendation is None:
            # The first date stays for the same reason as below: a recommendation re-dated is not another one.
            since = _time(said.get("noticeTime"))
            self._recommendation = PreemptionNotice(NoticeKind.ADVISORY, self.name, f"rebalance {_stamp(since)}")
        return self._recommendation

    def _interrupted(self, said: dict[str, Any]) -> PreemptionNotice:
        action = said.get("action")
        if not isinstance(action, str) or not re.fullmatch(r"[a-z-]{1,40}", action):
            raise SpotError(f"{self.where} announces an interruption without an action: {said!r}")
        deadline = _time(said.get("time"))
        held = self._interruption
        if held is None or action != self._action:
            self._action = action
            return PreemptionNotice(NoticeKind.TERMINATE, self.name, f"{action} {_stamp(deadline)}", deadline)
        # One unbroken announcement of one action is one notice, whatever its date: AWS's own emulator moves the date
        # two minutes ahead of every poll, and following it would make the deadline one that never comes. EC2 itself
        # does not postpone. Of several dates the earliest is the one that it is safe to be ready for.
        if deadline is not None and (held.deadline is None or deadline < held.deadline):
            return replace(held, deadline=deadline)
        return held

    def read(self, path: str) -> bytes | None:
        """What stands under ``/latest/meta-data/`` and ``path``; None for 404. Raises SpotError."""
        status, body = self._request("GET", f"/latest/meta-data/{path}", {_TOKEN_HEADER: self._current_token()})
        if status == 401:
            # The token can die before its time: the clock stood still in hibernation, or the service was restarted.
            self._renew_at = float("-inf")
            status, body = self._request("GET", f"/latest/meta-data/{path}", {_TOKEN_HEADER: self._current_token()})
        if status == 404:
            return None
        self._expect_ok(status, path)
        return body

    def _ask(self, path: str) -> dict[str, Any] | None:
        """The JSON object under ``path``; None for 404, which is how the service says "nothing"."""
        body = self.read(path)
        if body is None:
            return None
        try:
            said = json.loads(body)
        except ValueError as error:
            raise SpotError(f"{self.where} answered {path} with something that is no JSON: {body[:200]!r}") from error
        if not isinstance(said, dict):
            raise SpotError(f"{self.where} answered {path} with something that is no JSON object: {body[:200]!r}")
        return said

    def _current_token(self) -> str:
        if self._clock() >= self._renew_at:
            asked_at = self._clock()
            status, body = self._request("PUT", _TOKEN_PATH, {_TTL_HEADER: str(_TOKEN_TTL_S)})
            self._expect_ok(status, _TOKEN_PATH)
            if not re.fullmatch(rb"[!-~]+", body.strip()):
                raise SpotError(f"{self.where} gave something that is no session token")
            self._token = body.strip().decode("ascii")
            self._renew_at = asked_at + _TOKEN_TTL_S - _RENEW_EARLY_S
        return self._token

    def _expect_ok(self, status: int, path: str) -> None:
        if status == 200:
            return
        hint = ""
        if status == 403:
            hint = "aws ec2 modify-instance-metadata-options --http-endpoint enabled --instance-id ID"
        raise SpotError(f"{self.where} answered {path} with status {status}", hint=hint)

    def _request(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
        for left in reversed(range(self._attempts)):
            try:
                status, body = self._request_once(method, path, headers)
            except (OSError, http.client.HTTPException) as error:
                if left:
                    continue
                raise SpotError(
                    f"no answer from {self.where} in {self._timeout_s:g} s: {error or type(error).__name__}",
                    hint="inside a container on EC2: aws ec2 modify-instance-metadata-options "
                    "--http-put-response-hop-limit 2 --instance-id ID",
                ) from error
            if status < 500 or not left:
                return status, body
        raise AssertionError("unreachable: there is at least one attempt")

    def _request_once(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
        connection, prefix = self._connect()
        try:
            connection.request(method, prefix + path, headers=headers)
            response = connection.getresponse()
            return response.status, response.read(_LONGEST_ANSWER_BYTES)
        finally:
            connection.close()


def _connector(endpoint: str, timeout_s: float) -> Callable[[], tuple[http.client.HTTPConnection, str]]:
    """Makes a connection and the path that goes before every request's. http.client knows of no proxies."""
    try:
        url = urlsplit(endpoint)
        host, port = url.hostname, url.port
    except ValueError as error:
        raise ConfigError(f"{endpoint!r} is no URL: {error}", hint=f"{ENDPOINT_VARIABLE}=http://host:port") from error
    classes = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    if url.scheme not in classes or not host:
        raise ConfigError(f"{endpoint!r} is no http:// URL", hint=f"{ENDPOINT_VARIABLE}={_ENDPOINTS['ipv4']}")
    return lambda: (classes[url.scheme](host, port, timeout=timeout_s), url.path)


def _time(text: object) -> datetime | None:
    """An ISO time, or None for anything else: an interruption at an unknown time is still one."""
    try:
        # Python 3.10 does not know the suffix Z.
        moment = datetime.fromisoformat(str(text).strip().replace("Z", "+00:00"))
    except ValueError:
        return None
    return moment.astimezone(timezone.utc) if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def _stamp(moment: datetime | None) -> str:
    return "at an unknown time" if moment is None else moment.strftime("%Y-%m-%dT%H:%M:%SZ")
