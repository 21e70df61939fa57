"""What ranks tell each other at the end of a step, and after the last one."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

_NO_DEADLINE = -1e18  # in place of a deadline: smaller than any, as the soonest deadline is the largest value


@dataclass(frozen=True)
class Ballot:
    """What one rank knows; merged, what any rank knows.

    Args:
        terminate: a notice of termination holds.
        advisory: rank 0 has received an advisory that has not been answered yet.
        fenced: a newer launch owns the run.
        save_is_due: rank 0's save schedule wants a save.
        is_draining: rank 0 still waits for the last commit.
        seconds_left: until the soonest deadline; None where no notice names one.
    """

    terminate: bool = False
    advisory: bool = False
    fenced: bool = False
    save_is_due: bool = False
    is_draining: bool = False
    seconds_left: float | None = None

    def to_values(self) -> tuple[float, ...]:
        """Return `VALUES` numbers. Ballots are merged by taking the largest of each."""
        left = _NO_DEADLINE if self.seconds_left is None else -self.seconds_left
        return (*map(float, (self.terminate, self.advisory, self.fenced, self.save_is_due, self.is_draining)), left)

    @classmethod
    def from_values(cls, values: Any) -> Ballot:
        """Return the ballot for `VALUES` numbers of `to_values`, merged or not."""
        *flags, left = values
        terminate, advisory, fenced, save_is_due, is_draining = map(bool, flags)
        seconds_left = None if left == _NO_DEADLINE else -left
        return cls(terminate, advisory, fenced, save_is_due, is_draining, seconds_left)


VALUES = len(fields(Ballot))
