"""Read from the journal how long a run's machines have lived, for `hf_spot.policy.cadence`.

Every commit carries the history known when it was made, so only the entries from the newest such commit on are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any

from hf_spot.errors import ObjectNotFound
from hf_spot.policy.cadence import History, SaveCost
from hf_spot.run.journal import BY_HAND, ENDINGS, TRAINING_KEY, Entry, Journal

_MOST_ENTRIES = 64  # reached only after many launches in a row that committed nothing; older ones would change little


@dataclass(frozen=True)
class Past:
    """What the journal says about the launches of a run.

    Args:
        history: of all launches up to now, but for the end of the one that is under way.
        as_of: time of the newest entry of the launch under way; its uptime is counted up to there.
        cost: of the newest save.
        steps_lost: steps that the previous launch trained but did not commit; None if unknown.
    """

    history: History = field(default_factory=History)
    as_of: datetime | None = None
    cost: SaveCost = field(default_factory=SaveCost)
    steps_lost: int | None = None

    def now(self, time: datetime) -> History:
        """Return the history, with the uptime of the launch under way counted up to ``time``."""
        more_s = 0.0 if self.as_of is None else max(0.0, (time - self.as_of).total_seconds())
        return replace(self.history, uptime_s=self.history.uptime_s + more_s)


def read_past(journal: Journal) -> Past:
    """Read the newest entries, one request each, back to a commit that carries the history.

    That is usually the second or third entry. At most 64 are read.

    Raises:
        StoreUnavailable: the store did not answer.
    """
    newest = journal.state.number
    entries: list[Entry] = []
    for number in range(newest, max(0, newest - _MOST_ENTRIES), -1):
        try:
            entries.append(journal.read(number))
        except ObjectNotFound:  # somebody deleted the beginning of the journal
            break
        if _carried(entries[-1]) is not None:
            break
    return gather(reversed(entries))


def gather(entries: Iterable[Entry]) -> Past:
    """Fold entries into a `Past`. Pure.

    A launch without an entry for its end was interrupted without notice if another launch follows it. A launch that failed was
    not interrupted: its script would have failed on any machine. Times are compared within one launch only.

    Args:
        entries: oldest first; the last ones are of the launch under way.
    """
    past, announced = Past(), False
    for entry in entries:
        if entry.kind == "prune" or entry.data.get("reason") == "push":  # may come from another process, at any time
            continue
        if entry.kind == "claim":
            if past.as_of is not None:
                past = replace(past, history=_interrupted(past.history, announced), steps_lost=0 if announced else None)
            trains = entry.data.get("by") != BY_HAND
            past, announced = replace(past, as_of=entry.time if trains else None), False
            continue
        past = replace(past, history=past.now(entry.time), as_of=entry.time)
        if entry.kind == "lost":
            committed = entry.state.latest(entry.data.get(TRAINING_KEY, 1))
            known = max(committed.step if committed else 0, entry.data.get("resumed_step", 0))
            past = replace(past, steps_lost=max(0, entry.data.get("step", 0) - known))
        elif entry.kind == "commit":
            announced = entry.data.get("reason") == "notice"
            past = replace(past, history=_carried(entry) or past.history, cost=_cost(entry.data))
        elif entry.kind in ENDINGS:
            reached, committed = entry.data.get("step"), entry.data.get("committed_step")
            lost = None if reached is None or committed is None else max(0, reached - committed)
            history = past.history
            if entry.kind == "preempted":
                history = _interrupted(history, announced if lost is None else lost == 0)
            past = replace(past, history=history, as_of=None, steps_lost=0 if entry.kind == "finished" else lost)
    return past


def to_details(history: History) -> dict[str, Any]:
    """Return the history in the form in which a commit carries it."""
    return {"history": {**asdict(history), "uptime_s": round(history.uptime_s, 3)}}


def _carried(entry: Entry) -> History | None:
    found = entry.data.get("history") if entry.kind == "commit" and entry.data.get("reason") != "push" else None
    try:
        return History(**found) if found else None
    except TypeError:  # written by a newer hf_spot
        return None


def _interrupted(history: History, announced: bool) -> History:
    return replace(history, announced=history.announced + announced, unannounced=history.unannounced + (not announced))


def _cost(data: dict[str, Any]) -> SaveCost:
    stall_s, save_s, upload_s = (data.get(name) for name in ("stall_s", "save_s", "upload_s"))
    return SaveCost(stall_s, None if save_s is None or upload_s is None else math.fsum((save_s, upload_s)))
