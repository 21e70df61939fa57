"""Notices of EC2, whose metadata service (IMDSv2) announces spot interruptions and rebalance recommendations."""

from __future__ import annotations

import http.client
import logging
import re
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from hf_spot.aws_errors import HOP_LIMIT
from hf_spot.errors import ConfigError, SpotError
from hf_spot.notices.metadata import TOKEN_PATH, Announcement, MetadataService, Session, iso_time, stamp
from hf_spot.notices.notice import NoticeKind, PreemptionNotice

log = logging.getLogger("hf_spot")

ENDPOINT_VARIABLE = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
MODE_VARIABLE = "AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE"
V1_DISABLED_VARIABLE = "AWS_EC2_METADATA_V1_DISABLED"
DISABLED_VARIABLE = "AWS_EC2_METADATA_DISABLED"
TIMEOUT_VARIABLE = "AWS_METADATA_SERVICE_TIMEOUT"
ATTEMPTS_VARIABLE = "AWS_METADATA_SERVICE_NUM_ATTEMPTS"

_ENDPOINTS = {"ipv4": "http://169.254.169.254", "ipv6": "http://[fd00:ec2::254]"}
_TOKEN_HEADER = "X-aws-ec2-metadata-token"
_LEAST_HOPS = {  # Linux; the socket module has no names for IP_MINTTL and IPV6_MINHOPCOUNT
    socket.AF_INET: (socket.IPPROTO_IP, 21),
    socket.AF_INET6: (socket.IPPROTO_IPV6, 73),
}


def is_disabled(environ: Mapping[str, str]) -> bool:
    """Return True if the environment forbids queries to the metadata service."""
    return environ.get(DISABLED_VARIABLE, "").strip().lower() == "true"


class IMDSSource:
    """The instance metadata service of EC2. It is queried directly, never through a proxy named in the environment.

    Args:
        endpoint: ``http://host[:port]``.
        timeout_s: limit of one attempt for each part of a response.
        attempts: tries of a request within one poll. One is enough for a watcher, which polls again anyway.
        interval_s: seconds between polls; AWS recommends 5 or fewer.
        allow_v1: ask without a session token where the service gives none (IMDSv1), as botocore does.
        clock: monotonic seconds, for the age of the session token.

    Raises:
        ConfigError: the endpoint is not an HTTP URL, or a number is out of range.
    """

    name = "imds"

    def __init__(
        self,
        endpoint: str = _ENDPOINTS["ipv4"],
        *,
        timeout_s: float = 1.0,
        attempts: int = 1,
        interval_s: float = 2.0,
        allow_v1: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not timeout_s > 0 or attempts < 1:
            raise ConfigError(
                f"the metadata service can't be queried with {attempts} attempts and a timeout of {timeout_s} s",
                hint=f"use at least one attempt and more than 0 seconds: {ATTEMPTS_VARIABLE}=1 {TIMEOUT_VARIABLE}=1",
            )
        modify = "aws ec2 modify-instance-metadata-options"
        self._service = MetadataService(
            endpoint,
            ENDPOINT_VARIABLE,
            timeout_s=timeout_s,
            attempts=attempts,
            hint=f"inside a container on EC2: {HOP_LIMIT}",
        )
        self._session = Session(
            self._service,
            _TOKEN_HEADER,
            without_token=self._tell_v1 if allow_v1 else None,
            forbidden_hint=f"{modify} --http-endpoint enabled --instance-id ID",
            clock=clock,
        )
        self._told_v1 = False
        self.where = self._service.where
        self.interval_s = interval_s
        self._interruption = Announcement(self.name)
        self._recommendation: PreemptionNotice | None = None

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], *, timeout_s: float = 1.0) -> IMDSSource:
        """Return the source that the AWS SDKs' environment variables describe.

        Args:
            environ: the environment.
            timeout_s: used if the environment names no timeout.

        Raises:
            ConfigError: the metadata service is disabled, or a variable has a value that can't be used.
        """
        if is_disabled(environ):
            raise ConfigError(
                f"{DISABLED_VARIABLE}=true forbids queries to the metadata service of EC2",
                hint=f"unset {DISABLED_VARIABLE}, or remove imds from --notice",
            )
        mode = environ.get(MODE_VARIABLE, "").strip().lower() or "ipv4"
        if mode not in _ENDPOINTS:
            raise ConfigError(
                f"{MODE_VARIABLE}={environ[MODE_VARIABLE]!r} is neither IPv4 nor IPv6", hint=f"{MODE_VARIABLE}=IPv4"
            )
        try:
            timeout_s = float(environ.get(TIMEOUT_VARIABLE) or timeout_s)
            attempts = int(environ.get(ATTEMPTS_VARIABLE) or 1)
        except ValueError as error:
            raise ConfigError(
                f"{TIMEOUT_VARIABLE} and {ATTEMPTS_VARIABLE} must be numbers: {error}",
                hint=f"{TIMEOUT_VARIABLE}=1 {ATTEMPTS_VARIABLE}=1",
            ) from error
        endpoint = environ.get(ENDPOINT_VARIABLE) or _ENDPOINTS[mode]
        allow_v1 = environ.get(V1_DISABLED_VARIABLE, "").strip().lower() != "true"
        return cls(endpoint, timeout_s=timeout_s, attempts=attempts, allow_v1=allow_v1)

    def _tell_v1(self) -> None:
        if not self._told_v1:
            log.warning(
                "%s gives no session tokens and answers without them (IMDSv1): notices are detected. To use IMDSv2: aws ec2 "
                "modify-instance-metadata-options --http-tokens required --http-endpoint enabled --instance-id ID; inside a "
                "container: %s",
                self.where,
                HOP_LIMIT,
            )
        self._told_v1 = True

    def poll(self) -> PreemptionNotice | None:
        """Return what the metadata service announces now.

        TERMINATE: an interruption is scheduled (terminate, stop or hibernate; hibernation begins at once, so its
        deadline may be past). ADVISORY: a rebalance is recommended. CANCELLED, once: a scheduled interruption is no
        longer announced.

        Raises:
            SpotError: no response in time, or an invalid one.
        """
        stated = self._ask("spot/instance-action")
        if stated is not None:
            return self._interrupted(stated)
        if (cancelled := self._interruption.withdrawn()) is not None:
            return cancelled
        stated = self._ask("events/recommendations/rebalance")
        if stated is None:
            self._recommendation = None
        elif self._recommendation is None:
            # Keep the first date: AWS's emulator changes the date of the same recommendation.
            since = iso_time(stated.get("noticeTime"))
            self._recommendation = PreemptionNotice(NoticeKind.ADVISORY, self.name, f"rebalance {stamp(since)}")
        return self._recommendation

    def _interrupted(self, stated: dict[str, Any]) -> PreemptionNotice:
        action = stated.get("action")
        if not isinstance(action, str) or not re.fullmatch(r"[a-z-]{1,40}", action):
            raise SpotError(f"{self.where} announces an interruption without an action: {stated!r}")
        deadline = iso_time(stated.get("time"))
        return self._interruption.announced(action, f"{action} {stamp(deadline)}", deadline)

    def read(self, path: str) -> bytes | None:
        """Return the value of ``path`` below ``/latest/meta-data/``, or None for 404. Raises SpotError."""
        return self._session.ask(path)

    def has_a_hop_to_spare(self) -> bool:
        """Return whether a session token would also reach a container behind a bridge, one hop further than this process.

        The kernel is told to drop packets on their last hop (``IP_MINTTL``, see ip(7)), as the bridge would. Raises SpotError
        if the service can't be reached at all.
        """
        self._session.token()
        connection, prefix = self._service.connect()
        try:
            connection.connect()
            level, option = _LEAST_HOPS[connection.sock.family]
            connection.sock.setsockopt(level, option, 2)
            connection.request("PUT", prefix + TOKEN_PATH, headers={f"{_TOKEN_HEADER}-ttl-seconds": "1"})
            return connection.getresponse().status == 200
        except TimeoutError:
            return False
        except (OSError, http.client.HTTPException) as error:
            raise SpotError(f"{self.where} closed the connection: {error}") from error
        finally:
            connection.close()

    def _ask(self, path: str) -> dict[str, Any] | None:
        body = self.read(path)
        return None if body is None else self._service.json_object(body, path)
