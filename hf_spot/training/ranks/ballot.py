"""What ranks exchange at the end of a step, and after the last one."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

_NO_DEADLINE = -1e18  # stands for no deadline: smaller than any value, because the soonest deadline is the largest value


@dataclass(frozen=True)
class Ballot:
    """What one rank knows; merged, what at least one rank knows.

    Args:
        terminate: a termination notice is in force.
        advisory: rank 0 has received an advisory that it has not acted on yet.
        fenced: a newer launch owns the run.
        save_is_due: rank 0's save schedule wants a save.
        is_draining: rank 0 still waits for the last commit.
        seconds_left: seconds until the soonest deadline; None if no notice has one.
    """

    terminate: bool = False
    advisory: bool = False
    fenced: bool = False
    save_is_due: bool = False
    is_draining: bool = False
    seconds_left: float | None = None

    def to_values(self) -> tuple[float, ...]:
        """Return `VALUES` numbers. Ballots are merged by the maximum of each number."""
        left = _NO_DEADLINE if self.seconds_left is None else -self.seconds_left
        return (*map(float, (self.terminate, self.advisory, self.fenced, self.save_is_due, self.is_draining)), left)

    @classmethod
    def from_values(cls, values: Any) -> Ballot:
        """Return the ballot for the numbers of `to_values`, merged or not."""
        *flags, left = values
        terminate, advisory, fenced, save_is_due, is_draining = map(bool, flags)
        seconds_left = None if left == _NO_DEADLINE else -left
        return cls(terminate, advisory, fenced, save_is_due, is_draining, seconds_left)


VALUES = len(fields(Ballot))
