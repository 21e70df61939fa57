"""How a launch spends its time, for the journal: `hf_spot.economics.report` adds it up."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any


class Timing:
    """Measures one training from its claim on.

    Args:
        now: the wall clock, because another process may have made the claim.
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
        """Record when the run was claimed; None if unknown."""
        self._claimed_at = at or self._claimed_at

    def restored(self, took_s: float) -> None:
        """Record how many seconds it took to fetch and verify a checkpoint."""
        self._restore_s = took_s

    def step_begins(self, step: int) -> bool:
        """Record that a step begins after ``step`` others; return whether it is the first of this launch."""
        if self._first_step_s is not None:
            return False
        self._first_step_s = (self._now() - self._claimed_at).total_seconds()
        self._first_step_at, self._first_step = self._clock(), step
        return True

    def stalled(self, for_s: float | None) -> None:
        """Add the seconds that training stood still for a save; None if unknown."""
        self._stalled_s += for_s or 0.0

    def to_details(self, step: int) -> dict[str, Any]:
        """Return the seconds so far for a journal entry; ``steps_s`` includes evaluations.

        Args:
            step: number of the step reached.
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
