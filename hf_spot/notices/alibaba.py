"""Alibaba Cloud says on its metadata service when a preemptible instance will be released.

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
    """The metadata service of Alibaba Cloud, with a session token where the instance knows them (hardened mode).

    Args:
        endpoint: ``http://host[:port]``.
        timeout_s: how long the connection, and each part of an answer, may take.
        interval_s: seconds between polls.
        clock: seconds, monotonic; the age of the session token is measured with it.
        now: the wall clock.

    Raises:
        ConfigError: the endpoint is no HTTP URL.
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
        """The source at Alibaba's own address, or at $HF_SPOT_ALIBABA_METADATA_ENDPOINT. Raises ConfigError."""
        return cls(environ.get(ENDPOINT_VARIABLE) or _ENDPOINT)

    def poll(self) -> PreemptionNotice | None:
        """What the metadata service says now.

        TERMINATE: the instance will be released at that time. CANCELLED, once: that is no longer announced.

        Raises:
            SpotError: no answer in time, or one that is no time.
        """
        said = self._session.ask(_TERMINATION)
        if said is None:
            return self._release.silent()
        deadline = iso_time(said.decode("ascii", "replace"))
        if deadline is None:
            raise SpotError(f"{self.where} answered {_TERMINATION} with something that is no time: {said[:200]!r}")
        if deadline < self._now() - _STALE:
            return self._release.silent()  # of an earlier life of an instance that was stopped and started again
        return self._release.heard("release", f"release {stamp(deadline)}", deadline)
