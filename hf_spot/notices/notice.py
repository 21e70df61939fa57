"""What a preemption notice is, and what a source of notices must be."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timezone
from enum import Enum
from typing import Protocol, runtime_checkable


class NoticeKind(str, Enum):
    """How serious a notice is.

    ``TERMINATE``: the machine will be taken; save, commit, stop. ``ADVISORY``: it may be taken, as a rebalance recommendation
    says; save and go on. ``CANCELLED``: an earlier notice no longer holds.
    """

    TERMINATE = "TERMINATE"
    ADVISORY = "ADVISORY"
    CANCELLED = "CANCELLED"


@dataclass(frozen=True)
class PreemptionNotice:
    """One thing that was heard.

    Args:
        kind: how serious it is.
        source: the name of the `NoticeSource` that heard it, such as ``imds`` or ``signal``.
        id: the same for the same notice however often it is polled, so that repeats are recognised.
        deadline: when the machine goes, timezone-aware; None when the source does not say.
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
        """Seconds from ``now`` to the deadline (negative once past), or None without a deadline."""
        return None if self.deadline is None else (self.deadline - now).total_seconds()

    def to_json(self) -> str:
        """One line of JSON; `from_json` reads it back."""
        deadline = None if self.deadline is None else self.deadline.astimezone(timezone.utc).isoformat()
        return json.dumps({"kind": self.kind.value, "source": self.source, "id": self.id, "deadline": deadline})

    @classmethod
    def from_json(cls, text: str) -> PreemptionNotice:
        """Raises ValueError when ``text`` is no notice."""
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
    """Something that can be asked whether this machine is being taken away. These three members are the whole surface.

    ``name`` is what `--notice` calls it; ``interval_s`` is how many seconds the watcher waits between two polls.
    """

    name: str
    interval_s: float

    def poll(self) -> PreemptionNotice | None:
        """The notice that holds now, or None. Called from one thread, again and again; may block for a few seconds.

        Returning the same notice (same ``id``) again is expected. An exception is logged by the watcher and polling
        goes on: a source that has a bad minute must not end the watch.
        """
