"""What every source of notices promises, as one function that a test of a source calls."""

from __future__ import annotations

from collections.abc import Callable

from hf_spot.notices.notice import NoticeKind, NoticeSource, PreemptionNotice
from hf_spot.notices.watcher import Hooked, Watcher


def check_source(
    source: NoticeSource, announce: Callable[[], object], withdraw: Callable[[], object] | None = None
) -> PreemptionNotice:
    """Puts a source through what a `Watcher` does with it; returns the notice that it gave.

    Args:
        source: that has heard nothing yet.
        announce: makes the end of the machine known to it, and returns when the next poll can hear it.
        withdraw: takes that back, for a source that can hear so.

    Raises:
        AssertionError: a promise is broken, and which.
    """
    _must(isinstance(source, NoticeSource), f"{type(source).__name__} has name, interval_s and poll()")
    _must(isinstance(source.name, str) and source.name.isidentifier(), f"name is one word for --notice, not {source.name!r}")
    _must(0 < source.interval_s <= 60, f"interval_s is at most a minute, not {source.interval_s!r}")
    told: list[PreemptionNotice] = []
    watcher = Watcher([source], told.append)
    if isinstance(source, Hooked):
        source.install()
    try:
        return _check(source, watcher, told, announce, withdraw)
    finally:
        if isinstance(source, Hooked):
            source.restore()


def _check(
    source: NoticeSource,
    watcher: Watcher,
    told: list[PreemptionNotice],
    announce: Callable[[], object],
    withdraw: Callable[[], object] | None,
) -> PreemptionNotice:
    _must((early := source.poll()) is None, f"nothing announced is None, not {early}")
    watcher.poll_once()
    announce()
    notice = source.poll()
    if not isinstance(notice, PreemptionNotice):
        raise AssertionError(f"what is announced is heard at the next poll, which gave {notice!r}")
    _must(notice.kind is NoticeKind.TERMINATE, f"the end of the machine is a TERMINATE, not {notice.kind.value}")
    _must(notice.source == source.name, f"the notice names its source, {source.name!r}, not {notice.source!r}")
    _must(PreemptionNotice.from_json(notice.to_json()) == notice, "the notice survives its way to the other processes")
    again = source.poll()
    _must(again is not None and again.id == notice.id, f"the same announcement keeps its id, {notice.id!r}; then came {again}")
    _must(again is not None and again.deadline == notice.deadline, f"the deadline stays {notice.deadline}; then came {again}")
    for _ in range(3):
        watcher.poll_once()
    _must([one.id for one in told] == [notice.id], f"a watcher tells it once, not {told}")
    if withdraw is not None:
        withdraw()
        for _ in range(3):
            watcher.poll_once()
        kinds = [one.kind.value for one in told[1:]]
        _must(kinds == ["CANCELLED"], f"what is withdrawn is CANCELLED, once, not {kinds}")
        announce()
        watcher.poll_once()
        _must(told[-1].kind is NoticeKind.TERMINATE, f"what comes again is heard again, after {told[-1]}")
    return notice


def _must(kept: bool, promise: str) -> None:
    if not kept:
        raise AssertionError(promise)
