"""Watcher: polls sources of notices and passes changes to one listener. Threads only pass things on."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta, timezone
from types import TracebackType
from typing import Protocol, runtime_checkable

from hf_spot.notices.notice import NoticeKind, NoticeSource, PreemptionNotice

_REPEAT_TROUBLE_AFTER = timedelta(minutes=1)
_SAME_DEADLINE_S = 1.0  # a deadline that moves closer by less than this is the same deadline
_STOP_S = 0.2


@runtime_checkable
class Hooked(Protocol):
    """A source that must be installed in the process, from the main thread, before it can detect anything."""

    def install(self) -> None:
        """Called by `Watcher.start`."""

    def restore(self) -> None:
        """Called by `Watcher.stop`."""


@runtime_checkable
class Acknowledging(Protocol):
    """A source whose platform can be told that the machine may go now."""

    def acknowledge(self) -> bool:
        """Acknowledge the end that was announced last. Return False if there is none. Called from any thread."""


class Belief:
    """The combined state of all sources, and what the listener does not know yet. Pure: no clock, no threads.

    The rules: a TERMINATE stands until its source cancels it. Of several, the one with the earliest deadline counts, and
    any deadline counts more than none. While one stands, an ADVISORY is not delivered. A cancellation is delivered when
    no TERMINATE stands. Receiving the same notice again changes nothing.
    """

    def __init__(self) -> None:
        self._standing: dict[int, PreemptionNotice] = {}
        self._delivered: tuple[int, PreemptionNotice] | None = None
        self._delivered_advisories: set[tuple[int, str]] = set()
        self._cancelled: PreemptionNotice | None = None

    def receive(self, source: int, notice: PreemptionNotice) -> None:
        """Add what the source with this number announced."""
        held = self._standing.get(source)
        if notice.kind is NoticeKind.CANCELLED:
            # After a cancellation the same notice is a new announcement.
            self._delivered_advisories = {one for one in self._delivered_advisories if one[0] != source}
            if held is None:
                return
            del self._standing[source]
            if self._delivered is not None and self._delivered[0] == source:
                self._delivered = None
            if not self._terminations():
                self._cancelled = notice
        elif notice.kind is NoticeKind.TERMINATE or held is None or held.kind is NoticeKind.ADVISORY:
            self._standing[source] = notice

    def undelivered(self) -> tuple[int, PreemptionNotice] | None:
        """Return the next notice for the listener, with the number of its source; None if it knows everything."""
        terminations = self._terminations()
        if terminations:
            source, notice = min(terminations.items(), key=lambda item: _deadline_s(item[1]))
            if self._delivered is None or _is_new(source, notice, *self._delivered):
                return source, notice
            return None
        if self._cancelled is not None:
            return -1, self._cancelled
        for source, notice in self._standing.items():
            if (source, notice.id) not in self._delivered_advisories:
                return source, notice
        return None

    def delivered(self, source: int, notice: PreemptionNotice) -> None:
        """Record that the listener has received what `undelivered` returned."""
        if notice.kind is NoticeKind.ADVISORY:
            self._delivered_advisories.add((source, notice.id))
            return
        self._cancelled = None
        self._delivered = (source, notice) if notice.kind is NoticeKind.TERMINATE else None

    def _terminations(self) -> dict[int, PreemptionNotice]:
        return {source: one for source, one in self._standing.items() if one.kind is NoticeKind.TERMINATE}


def _is_new(source: int, notice: PreemptionNotice, known_source: int, known: PreemptionNotice) -> bool:
    announced_anew = source == known_source and notice.id != known.id
    return announced_anew or _deadline_s(notice) < _deadline_s(known) - _SAME_DEADLINE_S


def _deadline_s(notice: PreemptionNotice) -> float:
    return float("inf") if notice.deadline is None else notice.deadline.timestamp()


class Watcher:
    """Polls every source in its own thread and calls ``on_notice`` with what is new, one call at a time.

    A failure of a source or of the listener is retried at the next poll. It is logged the first time, and then at most
    once a minute for the same failure.

    Usable as a context manager; call `start` in the main thread if a source receives signals.

    Args:
        sources: what to poll.
        on_notice: the listener; called from the polling threads.
        now: the wall clock, timezone-aware.
        log: logger for failures.
    """

    def __init__(
        self,
        sources: Iterable[NoticeSource],
        on_notice: Callable[[PreemptionNotice], object],
        *,
        now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
        log: logging.Logger | None = None,
    ) -> None:
        self.sources = list(sources)
        self._on_notice = on_notice
        self._now = now
        self._log = log or logging.getLogger("hf_spot")
        self._belief = Belief()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        self._troubles: dict[tuple[str, str], datetime] = {}

    def start(self) -> None:
        """Start polling; every source is polled at once. May be called only once.

        Raises:
            RuntimeError: it has been started before.
        """
        if self._threads or self._stopped.is_set():
            raise RuntimeError("a Watcher can be started only once; create a new one")
        for source in self.sources:
            if isinstance(source, Hooked):
                source.install()
        for number, source in enumerate(self.sources):
            name = f"hf_spot-notices-{source.name}"
            thread = threading.Thread(target=self._watch, args=(number, source), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Stop polling, without waiting for a slow poll; no call of the listener begins afterwards."""
        self._stopped.set()
        give_up_at = time.monotonic() + _STOP_S
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, give_up_at - time.monotonic()))
        for source in self.sources:
            if isinstance(source, Hooked):
                source.restore()

    def poll_once(self) -> None:
        """Poll every source once, in the calling thread."""
        for number, source in enumerate(self.sources):
            self._poll(number, source)

    def acknowledge(self) -> None:
        """Tell the platforms that the machine may go, after the last commit. Failures are logged."""
        for source in self.sources:
            if isinstance(source, Acknowledging):
                try:
                    if source.acknowledge():
                        self._log.info("told %s that the machine may go", source.name)
                except Exception as error:
                    self._log.warning("%s could not be told that the machine may go: %s", source.name, error)

    def __enter__(self) -> Watcher:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop()

    def _watch(self, number: int, source: NoticeSource) -> None:
        while not self._stopped.is_set():
            self._poll(number, source)
            self._stopped.wait(source.interval_s)

    def _poll(self, number: int, source: NoticeSource) -> None:
        notice, trouble = None, None
        try:
            notice = source.poll()
        except Exception as error:
            trouble = error
        with self._lock:
            if trouble is not None:
                self._log_trouble(f"the source of notices {source.name!r} failed; it is polled again", trouble)
            if notice is not None:
                self._belief.receive(number, notice)
            with contextlib.suppress(_ListenerFailed):
                while (new := self._belief.undelivered()) and not self._stopped.is_set():
                    self._deliver(new[1])
                    self._belief.delivered(*new)

    def _deliver(self, notice: PreemptionNotice) -> None:
        try:
            self._on_notice(notice)
        except Exception as error:
            self._log_trouble(f"a notice ({notice.kind.value} from {notice.source}) could not be passed on", error)
            raise _ListenerFailed from error

    def _log_trouble(self, what: str, error: Exception) -> None:
        now = self._now()
        self._troubles = {one: at for one, at in self._troubles.items() if abs(now - at) < _REPEAT_TROUBLE_AFTER}
        trouble = (what, f"{type(error).__name__}: {error}")
        if trouble not in self._troubles:
            self._troubles[trouble] = now
            self._log.warning("%s: %s", *trouble)


class _ListenerFailed(Exception):
    """Ends one round of delivery; the next poll tries again."""
