"""Notices of Azure, whose Scheduled Events announce what will happen to a machine and can be acknowledged.

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
_MACHINE = re.compile(r"""[^\s\\/"'\[\]{}:|<>+=;,?*@&]{1,80}""")  # excludes braces and what Azure forbids in names
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
        """Return the event that Azure stated. Raises ValueError if it is not an event."""
        try:
            found = cls(
                id=stated["EventId"],
                type=stated["EventType"],
                status=stated.get("EventStatus", _SCHEDULED),
                resources=tuple(name.lower() for name in stated["Resources"]),
                not_before=_time(stated.get("NotBefore")),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not an event: {stated!r}") from error
        if not all(isinstance(text, str) and text for text in (found.id, found.type, found.status)):
            raise ValueError(f"not an event: {stated!r}")
        return found


class AzureSource:
    """Scheduled Events of Azure. Events that don't name this machine are ignored.

    The very first request of a machine enables Scheduled Events for it, and may take two minutes.

    Args:
        endpoint: ``http://host[:port]``.
        timeout_s: limit for the connection, and for each part of a response.
        first_answer_s: additional seconds for the very first response.
        interval_s: seconds between polls; Azure recommends one.

    Raises:
        ConfigError: the endpoint is not an HTTP URL.
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
        """Return the source at Azure's address, or at $HF_SPOT_AZURE_METADATA_ENDPOINT. Raises ConfigError."""
        return cls(environ.get(ENDPOINT_VARIABLE) or _ENDPOINT)

    def poll(self) -> PreemptionNotice | None:
        """Return what is scheduled for this machine now.

        TERMINATE: it will be preempted, deleted, moved to other hardware or restarted. ADVISORY: anything else, such as a
        pause (Freeze). CANCELLED, once: the end of the machine is no longer scheduled.

        Raises:
            SpotError: no response in time, or an invalid one.
        """
        mine = self._events()
        endings = [event for event in mine if event.type in _ENDINGS and not self._began_before_this_process(event)]
        if endings:
            event = self._event = min(endings, key=_begins)
            key = f"{event.type} {event.id}"
            return self._end.announced(key, f"{key} {stamp(event.not_before)}", event.not_before)
        self._event = None
        if (cancelled := self._end.withdrawn()) is not None:
            return cancelled
        mine = [event for event in mine if event.type not in _ENDINGS]
        if mine:
            event = min(mine, key=_begins)
            return PreemptionNotice(NoticeKind.ADVISORY, self.name, f"{event.type} {event.id}", event.not_before)
        return None

    def acknowledge(self) -> bool:
        """Tell Azure that the scheduled end may begin now. Return False if there was nothing to acknowledge.

        An event that also names other machines is not acknowledged: it would begin on all of them.

        Raises:
            SpotError: Azure refused.
        """
        event = self._event
        if event is None or event.status != _SCHEDULED or len(event.resources) > 1:
            return False
        self._ask("POST", _EVENTS, json.dumps({"StartRequests": [{"EventId": event.id}]}).encode())
        return True

    def _began_before_this_process(self, event: _Event) -> bool:
        """Return True for a restart that had begun when first seen: this process started after it; Azure still lists it."""
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
            raise SpotError(f"{self.where} answered scheduledevents with something that is {error}") from error
        return [event for event in events if self._machine in event.resources]

    def _ask_name(self) -> str:
        """Return the name of this machine in events. With a wrong name every event would be ignored."""
        name = self._ask("GET", _NAME).body.decode("utf-8", "replace").strip()
        if not _MACHINE.fullmatch(name):
            raise SpotError(f"{self.where} answered with something that is not a machine name: {name[:200]!r}")
        return name.lower()

    def _ask(self, method: str, path: str, body: bytes | None = None, *, patience_s: float = 0.0) -> Answer:
        headers = {"Metadata": "true"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        answer = self._service.request(method, path, headers, body, patience_s=patience_s)
        return self._service.expect_ok(answer, path.partition("?")[0])


def _begins(event: _Event) -> float:
    """Return a sort key for events: one that has begun states no time, and comes first."""
    return float("-inf") if event.not_before is None else event.not_before.timestamp()


def _time(text: object) -> datetime | None:
    """Parse a time of RFC 1123. Return None for anything else: an event at an unknown time is still an event."""
    try:
        moment = parsedate_to_datetime(str(text))
    except (ValueError, TypeError):
        return None
    return moment.astimezone(timezone.utc) if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
