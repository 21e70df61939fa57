"""The output of `hf-spot watch`: the active sources, what they answer now, and every notice as it arrives."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from typing import TextIO

from hf_spot.notices.notice import NoticeSource, PreemptionNotice
from hf_spot.notices.signals import SignalSource
from hf_spot.notices.watcher import Watcher

_TICK_S = 0.2


def watch(
    sources: Iterable[NoticeSource],
    *,
    out: TextIO,
    as_json: bool,
    duration_s: float | None = None,
    now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
) -> bool:
    """Poll every source once and print its answer, then print notices until Ctrl-C or for ``duration_s``.

    SIGTERM and SIGHUP are shown where signals are listened to, and end it as well.

    Args:
        sources: the sources to poll.
        out: where to print; lines are flushed one by one.
        as_json: print one JSON object per line, whose ``event`` is ``source`` or ``notice``.
        duration_s: seconds to listen after the first answers; 0 for the answers only, None for no limit.
        now: the wall clock.

    Returns:
        True if every source could be polled.
    """
    sources = list(sources)
    all_answered = True

    def say(fields: dict[str, object], text: str) -> None:
        print(json.dumps(fields) if as_json else text, file=out, flush=True)

    for source in sources:
        where = getattr(source, "where", "")
        try:
            notice, error = source.poll(), ""
        except Exception as failure:
            notice, error = None, str(failure) or type(failure).__name__
            all_answered = False
        answer = f"error: {error}" if error else _in_words(notice, now())
        stated = None if notice is None else json.loads(notice.to_json())
        say(
            {"event": "source", "name": source.name, "where": where, "notice": stated, "error": error or None},
            f"{source.name:<8}{where:<32}  {answer}",
        )
    if not sources:
        say({"event": "source", "name": None, "where": None, "notice": None, "error": None}, "no source of notices is active")

    def on_notice(notice: PreemptionNotice) -> None:
        heard_at = now()
        fields = {"event": "notice", "heard_at": heard_at.isoformat(), **json.loads(notice.to_json())}
        say(fields, f"{heard_at:%H:%M:%S}Z  {notice.source}  {_in_words(notice, heard_at)}")

    if sources and duration_s != 0:
        with contextlib.suppress(KeyboardInterrupt), Watcher(sources, on_notice, now=now):
            _wait([one for one in sources if isinstance(one, SignalSource)], duration_s)
    return all_answered


def _wait(signals: list[SignalSource], duration_s: float | None) -> None:
    began = time.monotonic()
    while duration_s is None or time.monotonic() - began < duration_s:
        told_to_end = any(source.count_of(name) for source in signals for name in ("SIGTERM", "SIGHUP"))
        time.sleep(_TICK_S if duration_s is None else min(_TICK_S, max(0.0, began + duration_s - time.monotonic())))
        if told_to_end:  # and shown by now
            return


def _in_words(notice: PreemptionNotice | None, now: datetime) -> str:
    if notice is None:
        return "no notice"
    left = notice.seconds_left(now)
    return f"{notice.kind.value} ({notice.id})" + ("" if left is None else f", {left:.0f} s left")
