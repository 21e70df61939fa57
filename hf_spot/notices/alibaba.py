"""Notices of Alibaba Cloud, whose metadata service announces when a preemptible instance will be released.

https://www.alibabacloud.com/help/en/ecs/user-guide/query-the-interruption-events-of-preemptible-instances
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta, timezone

from hf_spot.errors import SpotError
from hf_spot.notices.metadata import Announcement, MetadataService, Session, iso_time, stamp
from hf_spot.notices.notice import PreemptionNotice

ENDPOINT_VARIABLE = "HF_SPOT_ALIBABA_METADATA_ENDPOINT"

_ENDPOINT = "http://100.100.100.200"
_TERMINATION = "instance/spot/termination-time"
_STALE = timedelta(minutes=10)


class AlibabaSource:
    """The metadata service of Alibaba Cloud, with a session token if the instance supports it (hardened mode).

    Args:
        endpoint: ``http://host[:port]``.
        timeout_s: limit for the connection, and for each part of a response.
        interval_s: seconds between polls.
        clock: monotonic seconds, for the age of the session token.
        now: the wall clock.

    Raises:
        ConfigError: the endpoint is not an HTTP URL.
    """

    name = "alibaba"

    def __init__(
        self,
        endpoint: str = _ENDPOINT,
        *,
        timeout_s: float = 2.0,
        interval_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
    ) -> None:
        service = MetadataService(endpoint, ENDPOINT_VARIABLE, timeout_s=timeout_s)
        self._session = Session(service, "X-aliyun-ecs-metadata-token", optional=True, clock=clock)
        self.where = service.where
        self.interval_s = interval_s
        self._now = now
        self._release = Announcement(self.name)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> AlibabaSource:
        """Return the source at Alibaba's address, or at $HF_SPOT_ALIBABA_METADATA_ENDPOINT. Raises ConfigError."""
        return cls(environ.get(ENDPOINT_VARIABLE) or _ENDPOINT)

    def poll(self) -> PreemptionNotice | None:
        """Return what the metadata service announces now.

        TERMINATE: the instance will be released at that time. CANCELLED, once: the release is no longer announced.

        Raises:
            SpotError: no response in time, or one that is not a time.
        """
        body = self._session.ask(_TERMINATION)
        if body is None:
            return self._release.withdrawn()
        deadline = iso_time(body.decode("ascii", "replace"))
        if deadline is None:
            raise SpotError(f"{self.where} answered {_TERMINATION} with something that is not a time: {body[:200]!r}")
        if deadline < self._now() - _STALE:
            return self._release.withdrawn()  # left over from before the instance was stopped and started again
        return self._release.announced("release", f"release {stamp(deadline)}", deadline)
