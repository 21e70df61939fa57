"""A fake metadata service of EC2."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta, timezone

from hf_spot.testing.server import FakeSessionService, stamp

_ACTION = "spot/instance-action"
_REBALANCE = "events/recommendations/rebalance"


class FakeIMDS(FakeSessionService):
    """EC2's instance metadata service, version 2, as a real HTTP server on a free port of the loopback interface.

    As strict as the real one: a session token must be fetched by PUT with a time to live; a missing, unknown or expired
    token gives 401, a request through a proxy 403, and a path without an announcement 404.

    Usable as a context manager; everything may be called from any thread.

    Args:
        host: the address to listen on; one with a colon is IPv6.
        port: the port to listen on; 0 for any free one.
        redate: announce the interruption relative to each request (by default two minutes later), as AWS's emulator
            amazon-ec2-metadata-mock does, instead of at a fixed time.
        metadata: responses of further paths, below ``/latest/meta-data/`` or absolute ones that begin with a slash.
        hop_limit: hop limit of the response with a session token, as EC2's ``HttpPutResponseHopLimit``: with 1 it does not
            reach a container behind a bridge. None for no limit.
        now: the wall clock.
        clock: monotonic seconds, for the expiry of tokens.
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
        super().__init__("X-aws-ec2-metadata-token", host=host, port=port, hop_limit=hop_limit, now=now, clock=clock)
        self.redate = redate
        for path, body in (metadata or {}).items():
            self.answer(path, body)

    def env(self) -> dict[str, str]:
        """Return the variables that point a process to this server."""
        return {"AWS_EC2_METADATA_SERVICE_ENDPOINT": self.endpoint, "AWS_EC2_METADATA_DISABLED": "false"}

    def interrupt(self, in_s: float = 120, action: str = "terminate") -> datetime:
        """Announce that the instance will be interrupted. Return the time of the interruption.

        Args:
            in_s: seconds from now.
            action: ``terminate``, ``stop`` or ``hibernate``.
        """
        deadline = self._now() + timedelta(seconds=in_s)

        def body() -> str:
            moment = self._now() + timedelta(seconds=in_s) if self.redate else deadline
            return json.dumps({"action": action, "time": stamp(moment)})

        self._set(_ACTION, body)
        return deadline.replace(microsecond=0)

    def rebalance(self) -> None:
        """Announce a rebalance recommendation."""
        noticed = self._now()
        self._set(_REBALANCE, lambda: json.dumps({"noticeTime": stamp(self._now() if self.redate else noticed)}))

    def cancel(self) -> None:
        """Withdraw the announcements of `interrupt` and `rebalance`."""
        self._forget(_ACTION)
        self._forget(_REBALANCE)
