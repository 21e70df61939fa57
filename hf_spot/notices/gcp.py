"""Notices of Google Cloud, whose metadata server announces preemptions and maintenance of the host.

https://docs.cloud.google.com/compute/docs/instances/spot, https://docs.cloud.google.com/compute/docs/metadata/querying-metadata
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta, timezone
from urllib.parse import quote

from hf_spot.errors import ConfigError, SpotError
from hf_spot.notices.metadata import Announcement, Answer, MetadataService, stamp
from hf_spot.notices.notice import NoticeKind, PreemptionNotice

HOST_VARIABLE = "GCE_METADATA_HOST"
IP_VARIABLE = "GCE_METADATA_IP"
DISABLED_VARIABLE = "NO_GCE_CHECK"

_ADDRESS = "169.254.169.254"  # the host name would need a DNS query
_FLAVOR = "Metadata-Flavor"
_PREEMPTED = "preempted"
_MAINTENANCE = "maintenance-event"
_NO_MAINTENANCE = "NONE"


class GCPSource:
    """The metadata server of Google Cloud: a long poll that is answered as soon as a preemption begins.

    The server states no deadline. A machine created with ``--preemption-notice-duration=120s`` lives for 120 s after the
    notice; others are shut down at once, within 30 s.

    Args:
        host: ``host[:port]``.
        lives_s: seconds from the notice to the end of the machine.
        wait_s: how long one poll waits for a change; the first poll, and those after a failure or a notice, don't wait.
        timeout_s: limit for the connection, and for the response beyond ``wait_s``.
        interval_s: seconds between polls.
        now: the wall clock.

    Raises:
        ConfigError: the host is not valid.
    """

    name = "gcp"

    def __init__(
        self,
        host: str = _ADDRESS,
        *,
        lives_s: float = 30.0,
        wait_s: int = 10,
        timeout_s: float = 2.0,
        interval_s: float = 0.5,
        now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
    ) -> None:
        if "/" in host:
            raise ConfigError(f"{HOST_VARIABLE}={host!r} is not a host", hint=f"{HOST_VARIABLE}={_ADDRESS}, without http://")
        self._service = MetadataService(f"http://{host}", HOST_VARIABLE, timeout_s=timeout_s)
        self.where = self._service.where
        self.interval_s = interval_s
        self._lives_s = lives_s
        self._wait_s = wait_s
        self._now = now
        self._etag = ""
        self._preemption = Announcement(self.name)
        self._maintenance: PreemptionNotice | None = None

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], lives_s: float | None = None) -> GCPSource:
        """Return the source that the environment variables of Google's libraries describe.

        Args:
            environ: the environment.
            lives_s: as for the constructor; None for its default.

        Raises:
            ConfigError: a variable has a value that can't be used.
        """
        host = environ.get(HOST_VARIABLE) or environ.get(IP_VARIABLE) or _ADDRESS
        return cls(host) if lives_s is None else cls(host, lives_s=lives_s)

    def poll(self) -> PreemptionNotice | None:
        """Return what the metadata server announces now, or as soon as it changes.

        TERMINATE: the machine is preempted. ADVISORY: maintenance of its host; the machine moves to another host, or ends
        without a further notice. CANCELLED, once: the preemption is no longer announced.

        Raises:
            SpotError: no response in time, or an invalid one.
        """
        etag, self._etag = self._etag, ""  # after a failure the next poll asks for the state, not for a change
        wait = f"?wait_for_change=true&timeout_sec={self._wait_s}&last_etag={quote(etag, safe='')}" if etag else ""
        answer = self._ask(f"{_PREEMPTED}{wait}", patience_s=self._wait_s if etag else 0)
        value, etag = answer.body.strip(), answer.headers.get("ETag", "")
        if value == b"TRUE":
            deadline = self._now() + timedelta(seconds=self._lives_s)
            return self._preemption.announced("preempted", f"preempted {etag}".strip(), deadline)
        if value != b"FALSE":
            raise SpotError(f"{self.where} answered {_PREEMPTED} with neither TRUE nor FALSE: {value[:200]!r}")
        if (cancelled := self._preemption.withdrawn()) is not None:
            return cancelled
        notice = self._maintained()
        self._etag = etag
        return notice

    def _maintained(self) -> PreemptionNotice | None:
        event = self._ask(_MAINTENANCE).body.strip().decode("ascii", "replace")
        if event == _NO_MAINTENANCE:
            self._maintenance = None
        elif self._maintenance is None or not self._maintenance.id.startswith(f"{event} "):
            self._maintenance = PreemptionNotice(NoticeKind.ADVISORY, self.name, f"{event} {stamp(self._now())}")
        return self._maintenance

    def _ask(self, path: str, *, patience_s: float = 0) -> Answer:
        answer = self._service.request(
            "GET", f"/computeMetadata/v1/instance/{path}", {_FLAVOR: "Google"}, patience_s=patience_s
        )
        hint = ""
        if answer.status == 404:
            hint = "a pod on GKE gets only SIGTERM: --notice signal --grace-s 15"
        self._service.expect_ok(answer, path.partition("?")[0], hint=hint)
        if answer.headers.get(_FLAVOR) != "Google":
            raise SpotError(f"{self.where} is not a metadata server of Google Cloud: its response has no {_FLAVOR}: Google")
        return answer
