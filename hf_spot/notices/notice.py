"""Preemption notices, and the protocol of their sources."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timezone
from enum import Enum
from typing import Protocol, runtime_checkable


class NoticeKind(str, Enum):
    """How serious a notice is.

    ``TERMINATE``: the machine will be taken away; save, commit, stop. ``ADVISORY``: it may be taken away, for example after a
    rebalance recommendation; save and continue. ``CANCELLED``: an earlier notice no longer stands.
    """

    TERMINATE = "TERMINATE"
    ADVISORY = "ADVISORY"
    CANCELLED = "CANCELLED"


CHANGE_OF_MACHINES = "machines"  # the source of a notice that ends a launch, so that the next one has other machines


@dataclass(frozen=True)
class PreemptionNotice:
    """One preemption notice.

    Args:
        kind: how serious it is.
        source: the name of the `NoticeSource` that detected it, such as ``imds`` or ``signal``.
        id: identifies the notice; it is the same at every poll, so that repeats are recognised.
        deadline: when the machine is taken away, timezone-aware; None if the source does not say.
    """

    kind: NoticeKind
    source: str
    id: str
    deadline: datetime | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", NoticeKind(self.kind))
        if self.deadline is not None and self.deadline.tzinfo is None:
            raise ValueError(f"deadline {self.deadline!r} has no timezone; use datetime.now(timezone.utc)")

    def seconds_left(self, now: datetime) -> float | None:
        """Return the seconds from ``now`` to the deadline (negative once past), or None without a deadline."""
        return None if self.deadline is None else (self.deadline - now).total_seconds()

    def in_words(self) -> str:
        """Return what has happened, for people."""
        if self.kind is NoticeKind.TERMINATE and self.id.startswith("SIGINT "):
            return "interrupted by Ctrl-C"
        if self.source == CHANGE_OF_MACHINES:
            return f"the machines change, {self.id}"
        return f"{self.kind.value} from {self.source}"

    def to_json(self) -> str:
        """Return the notice as one line of JSON; `from_json` reads it back."""
        deadline = None if self.deadline is None else self.deadline.astimezone(timezone.utc).isoformat()
        return json.dumps({"kind": self.kind.value, "source": self.source, "id": self.id, "deadline": deadline})

    @classmethod
    def from_json(cls, text: str) -> PreemptionNotice:
        """Return the notice that `to_json` wrote. Raises ValueError if ``text`` is not a notice."""
        try:
            fields = json.loads(text)
            deadline = fields.get("deadline")
            return cls(
                kind=NoticeKind(fields["kind"]),
                source=str(fields["source"]),
                id=str(fields["id"]),
                deadline=None if deadline is None else datetime.fromisoformat(deadline),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a preemption notice: {text!r}") from error


@runtime_checkable
class NoticeSource(Protocol):
    """A source of preemption notices for this machine. These three members are the whole interface.

    ``name`` is its name for `--notice`; ``interval_s`` is the pause between two polls, in seconds.
    """

    name: str
    interval_s: float

    def poll(self) -> PreemptionNotice | None:
        """Return the notice that stands now, or None. Called repeatedly from one thread; may block for a few seconds.

        Returning the same notice (same ``id``) again is expected. The watcher logs an exception and continues polling: a
        temporary failure must not end the watch.
        """
