"""A fake metadata server of Google Cloud."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta, timezone
from urllib.parse import parse_qs, urlsplit

from hf_spot.testing.server import FakeService, Response

_INSTANCE = "/computeMetadata/v1/instance/"


class FakeGCP(FakeService):
    """Google Cloud's metadata server, as a real HTTP server on a free port of the loopback interface.

    Requests need the header ``Metadata-Flavor: Google`` and must not come through a proxy; otherwise they get 403. With
    ``wait_for_change=true`` the response is sent when the value differs from that of ``last_etag`` (without it: when it
    changes), or after ``timeout_sec``.

    Usable as a context manager; everything may be called from any thread.

    Args:
        host: the address to listen on.
        now: the wall clock.
    """

    def __init__(self, *, host: str = "127.0.0.1", now: Callable[[], datetime] = lambda: datetime.now(timezone.utc)) -> None:
        self._values = {"preempted": "FALSE", "maintenance-event": "NONE"}
        super().__init__(host=host, now=now)

    def env(self) -> dict[str, str]:
        """Return the variables that point a process to this server."""
        return {"GCE_METADATA_HOST": self.address, "NO_GCE_CHECK": "false"}

    def interrupt(self, in_s: float = 30) -> datetime:
        """Announce that the machine is preempted. Return the time at which it should be gone.

        Args:
            in_s: seconds from now, which the real server does not state.
        """
        self.answer("preempted", "TRUE")
        return self._now() + timedelta(seconds=in_s)

    def maintain(self, event: str = "TERMINATE_ON_HOST_MAINTENANCE") -> None:
        """Announce maintenance of the host.

        Args:
            event: ``TERMINATE_ON_HOST_MAINTENANCE`` or ``MIGRATE_ON_HOST_MAINTENANCE``.
        """
        self.answer("maintenance-event", event)

    def cancel(self) -> None:
        """Withdraw the announcements of `interrupt` and `maintain`."""
        self.answer("preempted", "FALSE")
        self.answer("maintenance-event", "NONE")

    def answer(self, path: str, body: str) -> None:
        """Set the response of ``path`` below ``instance/``, which may be invalid."""
        with self._changed:
            self._values[path] = body
            self._changed.notify_all()

    def _decide(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Response:
        if headers.get("metadata-flavor") != "Google" or "x-forwarded-for" in headers:
            return 403, "", {}
        if method != "GET":
            return 405, "", {}
        url = urlsplit(path)
        name = url.path.removeprefix(_INSTANCE)
        if not url.path.startswith(_INSTANCE) or name not in self._values:
            return 404, "", {"Metadata-Flavor": "Google"}
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        if query.get("wait_for_change", "").lower() == "true":
            seen = query.get("last_etag", _etag(self._values[name]))
            limit_s = float(query["timeout_sec"]) if "timeout_sec" in query else None
            self._changed.wait_for(lambda: _etag(self._values[name]) != seen or self._stopping.is_set(), limit_s)
        value = self._values[name]
        return 200, value, {"Metadata-Flavor": "Google", "ETag": _etag(value), "Content-Type": "application/text"}


def _etag(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()[:16]
