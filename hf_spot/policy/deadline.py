"""When a training that must be finished in time pays the full price. Pure.

The rule is Uniform Progress of Wu et al., "Can't Be Late: Optimizing Spot Instance Savings under Deadlines", NSDI 2024
(https://www.usenix.org/conference/nsdi24/presentation/wu-zhanghao), section 5. With ``W`` seconds of work in all, ``c(t)`` of
them done, a deadline ``D`` seconds after the start, and ``d`` seconds to change machines, uniform progress is
``e(t) = t·W/D``, and

1. while nothing runs and ``c(t) < e(t)``, an on-demand machine makes up for it;
2. a spot machine is taken whenever there is one, even then, and kept until it is taken away;
3. an on-demand machine is kept until ``c(t) ≥ e(t + 2d)``, because a change costs;
4. when the time that is left is no more than the work that is left and ``2d``, an on-demand machine finishes it.

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
    """How far a training is. All in seconds; work is counted in seconds of an uninterrupted training, saves included.

    Args:
        work_s: in all.
        done_s: of it, safe.
        elapsed_s: since the start.
        deadline_s: after the start.
        change_s: from the loss of a machine to where the training was, on the next one: start, and steps done again.
    """

    work_s: float
    done_s: float
    elapsed_s: float
    deadline_s: float
    change_s: float

    @property
    def slack_s(self) -> float:
        """What is left beside the work that is left; the safety net needs twice ``change_s``."""
        return self.deadline_s - self.elapsed_s - (self.work_s - self.done_s)


def choose(progress: Progress, on: Market, *, spot: bool) -> Market:
    """Where to go on.

    Args:
        progress: of the training.
        on: where it runs now.
        spot: whether a spot machine is there, or can be had.
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
    """Seconds after which `choose` may say something else although nothing but time has passed.

    Args:
        progress: of the training.
        on: where it runs: nowhere, or on demand, where it makes a second of progress each second.
    """
    if on is Market.SPOT:
        return math.inf
    pace = progress.work_s / progress.deadline_s
    if on is Market.ON_DEMAND:
        behind_s = -_lead_s(progress, 2 * progress.change_s)
        return behind_s / (1 - pace) if pace < 1 and behind_s > 0 else math.inf
    return max(0.0, min(_lead_s(progress) / pace, progress.slack_s - 2 * progress.change_s))


def _lead_s(progress: Progress, ahead_s: float = 0.0) -> float:
    """Work done beyond uniform progress, as it will be in ``ahead_s`` seconds."""
    return progress.done_s - (progress.elapsed_s + ahead_s) * progress.work_s / progress.deadline_s
