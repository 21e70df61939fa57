"""The contract of a source of notices, as a function for tests."""

from __future__ import annotations

from collections.abc import Callable

from hf_spot.notices.notice import NoticeKind, NoticeSource, PreemptionNotice
from hf_spot.notices.watcher import Hooked, Watcher


def check_source(
    source: NoticeSource, announce: Callable[[], object], withdraw: Callable[[], object] | None = None
) -> PreemptionNotice:
    """Check a source the way a `Watcher` uses it. Return the notice that it gave.

    Args:
        source: a source without any announcement yet.
        announce: announces the end of the machine, and returns when the next poll can detect it.
        withdraw: withdraws the announcement, for a source that can detect this.

    Raises:
        AssertionError: the source breaks the contract; the message names the broken promise.
    """
    _must(isinstance(source, NoticeSource), f"{type(source).__name__} has name, interval_s and poll()")
    _must(isinstance(source.name, str) and source.name.isidentifier(), f"name is one word for --notice, not {source.name!r}")
    _must(0 < source.interval_s <= 60, f"interval_s is at most a minute, not {source.interval_s!r}")
    delivered: list[PreemptionNotice] = []
    watcher = Watcher([source], delivered.append)
    if isinstance(source, Hooked):
        source.install()
    try:
        return _check(source, watcher, delivered, announce, withdraw)
    finally:
        if isinstance(source, Hooked):
            source.restore()


def _check(
    source: NoticeSource,
    watcher: Watcher,
    delivered: list[PreemptionNotice],
    announce: Callable[[], object],
    withdraw: Callable[[], object] | None,
) -> PreemptionNotice:
    _must((early := source.poll()) is None, f"poll() returns None before an announcement, not {early}")
    watcher.poll_once()
    announce()
    notice = source.poll()
    if not isinstance(notice, PreemptionNotice):
        raise AssertionError(f"the next poll() after an announcement returns a notice, not {notice!r}")
    _must(notice.kind is NoticeKind.TERMINATE, f"the end of the machine is a TERMINATE, not {notice.kind.value}")
    _must(notice.source == source.name, f"the notice names its source, {source.name!r}, not {notice.source!r}")
    _must(PreemptionNotice.from_json(notice.to_json()) == notice, "the notice survives its transfer to other processes")
    again = source.poll()
    _must(
        again is not None and again.id == notice.id,
        f"the same announcement keeps its id, {notice.id!r}, but the next poll() returned {again}",
    )
    _must(
        again is not None and again.deadline == notice.deadline,
        f"the deadline stays {notice.deadline}, but the next poll() returned {again}",
    )
    for _ in range(3):
        watcher.poll_once()
    _must([one.id for one in delivered] == [notice.id], f"a watcher delivers it once, not {delivered}")
    if withdraw is not None:
        withdraw()
        for _ in range(3):
            watcher.poll_once()
        kinds = [one.kind.value for one in delivered[1:]]
        _must(kinds == ["CANCELLED"], f"a withdrawn announcement is CANCELLED, once, not {kinds}")
        announce()
        watcher.poll_once()
        _must(delivered[-1].kind is NoticeKind.TERMINATE, f"a new announcement is a new notice, after {delivered[-1]}")
    return notice


def _must(kept: bool, promise: str) -> None:
    if not kept:
        raise AssertionError(promise)
