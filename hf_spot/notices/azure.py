"""Azure says in its Scheduled Events what will happen to a machine, and is told when that may begin.

https://learn.microsoft.com/en-us/azure/virtual-machines/linux/scheduled-events
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

from hf_spot.errors import SpotError
from hf_spot.notices.metadata import Announcement, Answer, MetadataService, stamp
from hf_spot.notices.notice import NoticeKind, PreemptionNotice

ENDPOINT_VARIABLE = "HF_SPOT_AZURE_METADATA_ENDPOINT"

_ENDPOINT = "http://169.254.169.254"
_EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
_NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
_MACHINE = re.compile(r"""[^\s\\/"'\[\]{}:|<>+=;,?*@&]{1,80}""")  # what Azure forbids in names, and braces
_FIRST_ANSWER_S = 120.0
_LAST = ("Preempt", "Terminate")
_ENDINGS = (*_LAST, "Redeploy", "Reboot")  # no process outlives these
_SCHEDULED = "Scheduled"


@dataclass(frozen=True)
class _Event:
    id: str
    type: str
    status: str
    resources: tuple[str, ...]
    not_before: datetime | None

    @classmethod
    def read(cls, stated: Any) -> _Event:
        """Raises ValueError when that is no event."""
        try:
            found = cls(
                id=stated["EventId"],
                type=stated["EventType"],
                status=stated.get("EventStatus", _SCHEDULED),
                resources=tuple(name.lower() for name in stated["Resources"]),
                not_before=_time(stated.get("NotBefore")),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no event: {stated!r}") from error
        if not all(isinstance(text, str) and text for text in (found.id, found.type, found.status)):
            raise ValueError(f"no event: {stated!r}")
        return found


class AzureSource:
    """Scheduled Events of Azure. Those that don't name this machine are somebody else's.

    The very first request of a machine makes Azure begin to watch it, and may take two minutes.

    Args:
        endpoint: ``http://host[:port]``.
        timeout_s: how long the connection, and each part of an answer, may take.
        first_answer_s: how much longer the very first answer may take.
        interval_s: seconds between polls; Azure recommends one.

    Raises:
        ConfigError: the endpoint is no HTTP URL.
    """

    name = "azure"

    def __init__(
        self,
        endpoint: str = _ENDPOINT,
        *,
        timeout_s: float = 5.0,
        first_answer_s: float = _FIRST_ANSWER_S,
        interval_s: float = 1.0,
    ) -> None:
        self._service = MetadataService(endpoint, ENDPOINT_VARIABLE, timeout_s=timeout_s)
        self.where = self._service.where
        self.interval_s = interval_s
        self._patience_s = first_answer_s
        self._machine = ""
        self._end = Announcement(self.name)
        self._event: _Event | None = None

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> AzureSource:
        """The source at Azure's own address, or at $HF_SPOT_AZURE_METADATA_ENDPOINT. Raises ConfigError."""
        return cls(environ.get(ENDPOINT_VARIABLE) or _ENDPOINT)

    def poll(self) -> PreemptionNotice | None:
        """What is scheduled for this machine now.

        TERMINATE: it is taken, deleted, moved to other hardware or restarted. ADVISORY: anything else, such as a pause
        (Freeze). CANCELLED, once: its end is no longer scheduled.

        Raises:
            SpotError: no answer in time, or one that makes no sense.
        """
        mine = self._events()
        endings = [event for event in mine if event.type in _ENDINGS and not self._is_behind_us(event)]
        if endings:
            event = self._event = min(endings, key=_begins)
            key = f"{event.type} {event.id}"
            return self._end.heard(key, f"{key} {stamp(event.not_before)}", event.not_before)
        self._event = None
        if (cancelled := self._end.silent()) is not None:
            return cancelled
        mine = [event for event in mine if event.type not in _ENDINGS]
        if mine:
            event = min(mine, key=_begins)
            return PreemptionNotice(NoticeKind.ADVISORY, self.name, f"{event.type} {event.id}", event.not_before)
        return None

    def acknowledge(self) -> bool:
        """Tells Azure that the end which is scheduled may begin now; whether there was one to tell.

        An event that names other machines too is left alone: it would begin on all of them.

        Raises:
            SpotError: Azure did not take it.
        """
        event = self._event
        if event is None or event.status != _SCHEDULED or len(event.resources) > 1:
            return False
        self._ask("POST", _EVENTS, json.dumps({"StartRequests": [{"EventId": event.id}]}).encode())
        return True

    def _is_behind_us(self, event: _Event) -> bool:
        """A restart that had begun before it was first heard of: this process came after it, and the event is still listed."""
        known = self._event is not None and self._event.id == event.id
        return event.status != _SCHEDULED and event.type not in _LAST and not known

    def _events(self) -> list[_Event]:
        answer = self._ask("GET", _EVENTS, patience_s=self._patience_s)
        self._patience_s = 0.0
        if not self._machine:
            self._machine = self._ask_name()
        stated = self._service.json_object(answer.body, "scheduledevents").get("Events")
        if not isinstance(stated, list):
            raise SpotError(f"{self.where} answered scheduledevents without Events: {answer.body[:200]!r}")
        try:
            events = [_Event.read(one) for one in stated]
        except ValueError as error:
            raise SpotError(f"{self.where} announces {error}") from error
        return [event for event in events if self._machine in event.resources]

    def _ask_name(self) -> str:
        """Of this machine, as events have it. A wrong one would make every event somebody else's for ever."""
        name = self._ask("GET", _NAME).body.decode("utf-8", "replace").strip()
        if not _MACHINE.fullmatch(name):
            raise SpotError(f"{self.where} answered with something that is no name of a machine: {name[:200]!r}")
        return name.lower()

    def _ask(self, method: str, path: str, body: bytes | None = None, *, patience_s: float = 0.0) -> Answer:
        headers = {"Metadata": "true"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        answer = self._service.request(method, path, headers, body, patience_s=patience_s)
        return self._service.expect_ok(answer, path.partition("?")[0])


def _begins(event: _Event) -> float:
    """For the order of events: one that has begun, and says no time any more, comes first."""
    return float("-inf") if event.not_before is None else event.not_before.timestamp()


def _time(text: object) -> datetime | None:
    """A time of RFC 1123, or None for anything else: an event at an unknown time is still one."""
    try:
        moment = parsedate_to_datetime(str(text))
    except (ValueError, TypeError):
        return None
    return moment.astimezone(timezone.utc) if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
