"""When a training with a deadline switches to on-demand machines. Pure.

The rule is Uniform Progress of Wu et al., "Can't Be Late: Optimizing Spot Instance Savings under Deadlines", NSDI 2024
(https://www.usenix.org/conference/nsdi24/presentation/wu-zhanghao), section 5. With ``W`` seconds of work in all, ``c(t)`` of
them done, a deadline ``D`` seconds after the start, and ``d`` seconds to change machines, uniform progress is
``e(t) = t·W/D``, and

1. while nothing runs and ``c(t) < e(t)``, an on-demand machine catches up;
2. a spot machine is used whenever one is available, even then, and kept until it is taken away;
3. an on-demand machine is kept until ``c(t) ≥ e(t + 2d)``, because a change costs time;
4. when the remaining time is no more than the remaining work and ``2d``, an on-demand machine finishes it.

The rule needs no forecast of spot capacity, and meets every deadline that leaves room for its safety net.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum


class Market(str, Enum):
    """Where the training runs next."""

    NONE = "none"
    SPOT = "spot"
    ON_DEMAND = "on-demand"


@dataclass(frozen=True)
class Progress:
    """The progress of a training. All in seconds; work is counted in seconds of an uninterrupted training, saves included.

    Args:
        work_s: total work.
        done_s: committed work.
        elapsed_s: time since the start.
        deadline_s: deadline, counted from the start.
        change_s: time from the loss of a machine until the next one has caught up: start, and repeated steps.
    """

    work_s: float
    done_s: float
    elapsed_s: float
    deadline_s: float
    change_s: float

    @property
    def slack_s(self) -> float:
        """Return the remaining time minus the remaining work; the safety net needs twice ``change_s``."""
        return self.deadline_s - self.elapsed_s - (self.work_s - self.done_s)


def choose(progress: Progress, on: Market, *, spot: bool) -> Market:
    """Return the market on which to continue.

    Args:
        progress: progress of the training.
        on: the market on which it runs now.
        spot: whether a spot machine is running or available.
    """
    if on is Market.SPOT and spot:
        return Market.SPOT
    if progress.slack_s <= 2 * progress.change_s:
        return Market.ON_DEMAND
    if on is Market.ON_DEMAND and _lead_s(progress, 2 * progress.change_s) < 0:
        return Market.ON_DEMAND
    if spot:
        return Market.SPOT
    return Market.ON_DEMAND if on is Market.NONE and _lead_s(progress) < 0 else Market.NONE


def holds_s(progress: Progress, on: Market) -> float:
    """Return the seconds after which `choose` may decide differently although only time has passed.

    Args:
        progress: progress of the training.
        on: the market on which it runs; on-demand machines make one second of progress each second.
    """
    if on is Market.SPOT:
        return math.inf
    pace = progress.work_s / progress.deadline_s
    if on is Market.ON_DEMAND:
        behind_s = -_lead_s(progress, 2 * progress.change_s)
        return behind_s / (1 - pace) if pace < 1 and behind_s > 0 else math.inf
    return max(0.0, min(_lead_s(progress) / pace, progress.slack_s - 2 * progress.change_s))


def _lead_s(progress: Progress, ahead_s: float = 0.0) -> float:
    """Return the work done beyond uniform progress, ``ahead_s`` seconds from now."""
    return progress.done_s - (progress.elapsed_s + ahead_s) * progress.work_s / progress.deadline_s
