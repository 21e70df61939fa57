"""What the time of a launch goes to, for the journal: `hf_spot.economics.report` adds it up."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any


class Timing:
    """A stopwatch of one training, from its claim on.

    Args:
        now: the wall clock: a claim may have been made by another process.
        clock: seconds, monotonic.
    """

    def __init__(self, now: Callable[[], datetime], clock: Callable[[], float]) -> None:
        self._now = now
        self._clock = clock
        self._claimed_at = now()
        self._restore_s: float | None = None
        self._first_step_s: float | None = None
        self._first_step_at = 0.0
        self._first_step = 0
        self._stalled_s = 0.0

    def claimed(self, at: datetime | None) -> None:
        """The run was claimed then; None when nobody knows."""
        self._claimed_at = at or self._claimed_at

    def restored(self, took_s: float) -> None:
        """A checkpoint was fetched and checked."""
        self._restore_s = took_s

    def step_begins(self, step: int) -> bool:
        """A step begins after ``step`` others; whether it is the first of this launch."""
        if self._first_step_s is not None:
            return False
        self._first_step_s = (self._now() - self._claimed_at).total_seconds()
        self._first_step_at, self._first_step = self._clock(), step
        return True

    def stalled(self, for_s: float | None) -> None:
        """Training stood still for a save; None when it is not known for how long."""
        self._stalled_s += for_s or 0.0

    def to_details(self, step: int) -> dict[str, Any]:
        """For an entry of the journal: seconds so far; ``steps_s`` has evaluations in it, too.

        Args:
            step: that is reached.
        """

        def rounded(seconds: float | None) -> float | None:
            return None if seconds is None else round(seconds, 3)

        began = self._first_step_s is not None
        timing = {
            "restore_s": rounded(self._restore_s),
            "first_step_s": rounded(self._first_step_s),
            "steps_s": rounded(self._clock() - self._first_step_at - self._stalled_s if began else 0.0),
            "stalled_s": rounded(self._stalled_s),
            "steps": step - self._first_step if began else 0,
            "step": step,
        }
        return {"timing": timing}
