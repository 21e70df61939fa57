"""A fake metadata service of Alibaba Cloud."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta, timezone

from hf_spot.testing.server import FakeSessionService, Response, stamp

_TERMINATION = "instance/spot/termination-time"


class FakeAlibaba(FakeSessionService):
    """Alibaba Cloud's instance metadata service, as a real HTTP server on a free port of the loopback interface.

    Usable as a context manager; everything may be called from any thread.

    Args:
        hardened: False accepts requests without a session token, as the service's normal mode does.
        knows_tokens: False imitates an old instance without support for tokens.
        host: the address to listen on.
        now: the wall clock.
        clock: monotonic seconds, for the expiry of tokens.
    """

    def __init__(
        self,
        *,
        hardened: bool = True,
        knows_tokens: bool = True,
        host: str = "127.0.0.1",
        now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__("X-aliyun-ecs-metadata-token", host=host, now=now, clock=clock)
        self._hardened = hardened
        self._knows_tokens = knows_tokens

    def env(self) -> dict[str, str]:
        """Return the variable that points hf_spot to this server."""
        return {"HF_SPOT_ALIBABA_METADATA_ENDPOINT": self.endpoint}

    def interrupt(self, in_s: float = 300) -> datetime:
        """Announce that the instance will be released. Return the time of the release.

        Args:
            in_s: seconds from now; the real service announces it five minutes ahead.
        """
        deadline = self._now() + timedelta(seconds=in_s)
        self.answer(_TERMINATION, stamp(deadline))
        return deadline.replace(microsecond=0)

    def cancel(self) -> None:
        """Withdraw the announcement of `interrupt`."""
        self._forget(_TERMINATION)

    def _without_token(self) -> int:
        return 403 if self._hardened else 200

    def _decide(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Response:
        if method == "PUT" and not self._knows_tokens:
            return 404, "", {}
        return super()._decide(method, path, headers, body)
