"""A fake of Azure's Scheduled Events."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from typing import Any
from urllib.parse import parse_qs, urlsplit

from hf_spot.testing.server import FakeService, Response

# https://learn.microsoft.com/en-us/azure/virtual-machines/linux/scheduled-events#version-and-region-availability
_VERSIONS = ("2017-08-01", "2017-11-01", "2019-01-01", "2019-04-01", "2019-08-01", "2020-07-01")


class FakeAzure(FakeService):
    """The part of Azure's instance metadata service for Scheduled Events, as a real HTTP server on loopback.

    Requests need the header ``Metadata: true`` and a version, and must not come through a proxy; otherwise they get 400, as
    does a request to start an event that isn't scheduled.

    Usable as a context manager; everything may be called from any thread.

    Args:
        name: name of this machine.
        first_answer_s: duration of the very first response, while Azure enables Scheduled Events for the machine.
        host: the address to listen on.
        now: the wall clock.
    """

    def __init__(
        self,
        *,
        name: str = "this-machine",
        first_answer_s: float = 0.0,
        host: str = "127.0.0.1",
        now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
    ) -> None:
        self.name = name
        self._first_answer_s = first_answer_s
        self._events: list[dict[str, Any]] = []
        self._incarnation = 1
        self._acknowledged: list[str] = []
        super().__init__(host=host, now=now)

    def env(self) -> dict[str, str]:
        """Return the variable that points hf_spot to this server."""
        return {"HF_SPOT_AZURE_METADATA_ENDPOINT": self.endpoint}

    def interrupt(self, in_s: float = 30, kind: str = "Preempt", resources: Sequence[str] | None = None) -> datetime:
        """Schedule an event. Return the earliest time at which it begins.

        Args:
            in_s: seconds from now.
            kind: ``Preempt``, ``Terminate``, ``Redeploy``, ``Reboot`` or ``Freeze``.
            resources: names of the affected machines; None for this one.
        """
        not_before = (self._now() + timedelta(seconds=in_s)).astimezone(timezone.utc).replace(microsecond=0)
        event = {
            "EventId": str(uuid.uuid4()).upper(),
            "EventType": kind,
            "ResourceType": "VirtualMachine",
            "Resources": [self.name] if resources is None else list(resources),
            "EventStatus": "Scheduled",
            "NotBefore": format_datetime(not_before, usegmt=True),
            "Description": "",
            "EventSource": "Platform",
            "DurationInSeconds": -1,
        }
        with self._lock:
            self._events.append(event)
            self._incarnation += 1
        return not_before

    def begin(self) -> None:
        """Start all scheduled events."""
        with self._lock:
            for event in self._events:
                self._start(event)

    def cancel(self) -> None:
        """Remove all events from the schedule."""
        with self._lock:
            self._events.clear()
            self._incarnation += 1

    @property
    def acknowledged(self) -> list[str]:
        """Return the ids of the events that a machine has acknowledged, in the order of the requests."""
        with self._lock:
            return list(self._acknowledged)

    def _start(self, event: dict[str, Any]) -> None:
        event.update(EventStatus="Started", NotBefore="")
        self._incarnation += 1

    def _decide(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Response:
        url = urlsplit(path)
        version = parse_qs(url.query).get("api-version", [""])[-1]
        if headers.get("metadata", "").lower() != "true" or "x-forwarded-for" in headers or not version:
            return 400, '{"error": "Bad request"}', {}
        if url.path == "/metadata/instance/compute/name" and method == "GET":
            return 200, self.name, {}
        if url.path != "/metadata/scheduledevents":
            return 404, "", {}
        if version not in _VERSIONS:
            return 400, json.dumps({"error": "Bad request. api-version is invalid", "newest-versions": _VERSIONS}), {}
        first_s, self._first_answer_s = self._first_answer_s, 0.0
        if first_s:
            self._changed.wait_for(self._stopping.is_set, first_s)
        if method == "POST":
            return self._acknowledge(body)
        document = {"DocumentIncarnation": self._incarnation, "Events": self._events}
        return 200, json.dumps(document), {"Content-Type": "application/json"}

    def _acknowledge(self, body: bytes) -> Response:
        try:
            wanted = [request["EventId"] for request in json.loads(body)["StartRequests"]]
        except (ValueError, KeyError, TypeError):
            return 400, '{"error": "Bad request"}', {}
        found = [event for event in self._events if event["EventId"] in wanted]
        if not wanted or len(found) != len(wanted):
            return 400, '{"error": "no such event"}', {}
        for event in found:
            self._acknowledged.append(event["EventId"])
            self._start(event)
        return 200, "", {}
