"""Watcher: polls sources of notices and tells one listener what changed. Threads here only move things."""

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
_NEWS_S = 1.0  # a deadline that comes closer by less than this is the same deadline
_STOP_S = 0.2


@runtime_checkable
class Hooked(Protocol):
    """A source that must be hooked into the process before it hears anything, from the main thread."""

    def install(self) -> None:
        """Called by `Watcher.start`."""

    def restore(self) -> None:
        """Called by `Watcher.stop`."""


@runtime_checkable
class Acknowledging(Protocol):
    """A source whose platform can be told that nothing keeps it waiting any more."""

    def acknowledge(self) -> bool:
        """Says so about the end that was announced last; whether there was anybody to tell. Called from any thread."""


class Belief:
    """What the sources say together, and what of it the listener has not been told. Pure: no clock, no threads.

    The rules: a TERMINATE stands until the source that said it cancels it. Of several, the one with the earliest
    deadline counts, and any deadline counts more than none. While one stands, an ADVISORY is not worth telling.
    A cancellation is told when nothing else stands. Hearing the same again changes nothing.
    """

    def __init__(self) -> None:
        self._standing: dict[int, PreemptionNotice] = {}
        self._told: tuple[int, PreemptionNotice] | None = None
        self._told_advisories: set[tuple[int, str]] = set()
        self._cancelled: PreemptionNotice | None = None

    def hear(self, source: int, notice: PreemptionNotice) -> None:
        """Takes in what the source with this number said."""
        held = self._standing.get(source)
        if notice.kind is NoticeKind.CANCELLED:
            # The same words after this are a new announcement.
            self._told_advisories = {one for one in self._told_advisories if one[0] != source}
            if held is None:
                return
            del self._standing[source]
            if self._told is not None and self._told[0] == source:
                self._told = None
            if not self._terminations():
                self._cancelled = notice
        elif notice.kind is NoticeKind.TERMINATE or held is None or held.kind is NoticeKind.ADVISORY:
            self._standing[source] = notice

    def news(self) -> tuple[int, PreemptionNotice] | None:
        """The next thing to tell the listener, with the number of its source; None when it knows everything."""
        terminations = self._terminations()
        if terminations:
            source, notice = min(terminations.items(), key=lambda item: _deadline_s(item[1]))
            if self._told is None or _is_news(source, notice, *self._told):
                return source, notice
            return None
        if self._cancelled is not None:
            return -1, self._cancelled
        for source, notice in self._standing.items():
            if (source, notice.id) not in self._told_advisories:
                return source, notice
        return None

    def told(self, source: int, notice: PreemptionNotice) -> None:
        """The listener has been told what `news` returned."""
        if notice.kind is NoticeKind.ADVISORY:
            self._told_advisories.add((source, notice.id))
            return
        self._cancelled = None
        self._told = (source, notice) if notice.kind is NoticeKind.TERMINATE else None

    def _terminations(self) -> dict[int, PreemptionNotice]:
        return {source: one for source, one in self._standing.items() if one.kind is NoticeKind.TERMINATE}


def _is_news(source: int, notice: PreemptionNotice, told_source: int, told: PreemptionNotice) -> bool:
    anew = source == told_source and notice.id != told.id
    return anew or _deadline_s(notice) < _deadline_s(told) - _NEWS_S


def _deadline_s(notice: PreemptionNotice) -> float:
    return float("inf") if notice.deadline is None else notice.deadline.timestamp()


class Watcher:
    """Polls every source in a thread of its own and calls ``on_notice`` with what is new, one call at a time.

    A source that fails, and a listener that fails, are logged and tried again at the next poll: the first time, and
    then at most once a minute for the same trouble.

    Usable as a context manager; `start` must be called in the main thread if signals are to be heard.

    Args:
        sources: what to poll.
        on_notice: the listener; called from the polling threads.
        now: the wall clock, timezone-aware.
        log: where trouble is told.
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
        """Starts listening; every source is polled at once. May be called once.

        Raises:
            RuntimeError: it was started before.
        """
        if self._threads or self._stopped.is_set():
            raise RuntimeError("a Watcher starts once; make a new one")
        for source in self.sources:
            if isinstance(source, Hooked):
                source.install()
        for number, source in enumerate(self.sources):
            name = f"hf_spot-notices-{source.name}"
            thread = threading.Thread(target=self._watch, args=(number, source), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Stops listening, without waiting for a poll that takes long; no call of the listener begins afterwards."""
        self._stopped.set()
        give_up_at = time.monotonic() + _STOP_S
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, give_up_at - time.monotonic()))
        for source in self.sources:
            if isinstance(source, Hooked):
                source.restore()

    def poll_once(self) -> None:
        """Polls every source once, here and now: what the threads do, without threads."""
        for number, source in enumerate(self.sources):
            self._poll(number, source)

    def acknowledge(self) -> None:
        """Tells the platforms that the machine may go: everything that was to be committed is. Trouble is logged."""
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
                self._complain(f"the source of notices {source.name!r} failed and will be asked again", trouble)
            if notice is not None:
                self._belief.hear(number, notice)
            with contextlib.suppress(_ListenerFailed):
                while (news := self._belief.news()) and not self._stopped.is_set():
                    self._tell(news[1])
                    self._belief.told(*news)

    def _tell(self, notice: PreemptionNotice) -> None:
        try:
            self._on_notice(notice)
        except Exception as error:
            self._complain(f"a notice ({notice.kind.value} from {notice.source}) could not be passed on", error)
            raise _ListenerFailed from error

    def _complain(self, what: str, error: Exception) -> None:
        now = self._now()
        self._troubles = {one: at for one, at in self._troubles.items() if abs(now - at) < _REPEAT_TROUBLE_AFTER}
        trouble = (what, f"{type(error).__name__}: {error}")
        if trouble not in self._troubles:
            self._troubles[trouble] = now
            self._log.warning("%s: %s", *trouble)


class _ListenerFailed(Exception):
    """Ends one round of telling; the next poll tries again."""
