"""How many machines a training has: when to ask for more, and which ones to give back. Pure.

`hf_spot.cloud.fleet` does what is decided here. Up to the smallest number with which there is a training, machines are taken
as the ladder of the job offers them, on-demand ones included. Beyond it a machine must be worth its price.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WAITS_S = 900.0  # machines that are too few to train cost as much as those that train
SPARE_S = 600.0
_FLAPPING = 0.1  # a price must be so much lower before a machine is asked for than the one for which it is given back
_EPSILON_USD = 1e-9


@dataclass(frozen=True)
class Member:
    """A machine that is there.

    Args:
        id: its id.
        usd_per_hour: its price now.
        is_on_demand: whether it costs the full price.
    """

    id: str
    usd_per_hour: float
    is_on_demand: bool


@dataclass(frozen=True)
class Goal:
    """What the job asks for.

    Args:
        least: machines with which there is a training.
        most: machines that are never exceeded.
        useful: takes how many are there, and returns how many of them train; the others are spares.
    """

    least: int
    most: int
    useful: Callable[[int], int]


@dataclass(frozen=True)
class Means:
    """What is left.

    Args:
        left_usd: of the budget.
        machine_hours: of work; None if unknown.
        deadline_h: hours until the training must be finished; None for no deadline.
    """

    left_usd: float
    machine_hours: float | None = None
    deadline_h: float | None = None

    @property
    def affordable_usd(self) -> float | None:
        """Return what an hour of one machine may cost on average, so that the budget lasts for the rest of the training; None
        if that is unknown."""
        if self.machine_hours is None or self.machine_hours <= 0:
            return None
        return max(0.0, self.left_usd) / self.machine_hours


@dataclass(frozen=True)
class Decision:
    """What to do about the machines of a training.

    Args:
        order: how many more to ask for.
        needed: how many of these are to be had from any rung of the ladder; the others only as spot machines.
        at_least: fewer of them would only be spares.
        most_usd_per_hour: the highest price of those that are not needed; None for no limit beyond the ladder's.
        end: ids of the machines to give back.
        why: the reason for giving back, or for asking for fewer than could be had; empty if there is none.
    """

    order: int = 0
    needed: int = 0
    at_least: int = 1
    most_usd_per_hour: float | None = None
    end: tuple[str, ...] = ()
    why: str = ""


def decide(goal: Goal, members: Sequence[Member], means: Means, settled_s: float) -> Decision:
    """Return what to do about the machines of a training.

    Given back is, in this order: all, if they have been too few to train for `WAITS_S`; what costs the full price beyond the
    minimum; the dearest beyond the minimum, while the budget does not last for the rest of the work at the mean price; spares
    that nothing has become of for `SPARE_S`. Machines that a deadline needs stay.

    Args:
        goal: what the job asks for.
        members: the machines that are there.
        means: what is left.
        settled_s: seconds since a machine has come or gone for the last time.
    """
    count = len(members)
    if count and count < goal.least and settled_s >= WAITS_S:
        ids = tuple(one.id for one in members)
        return Decision(end=ids, why=f"{count} of at least {goal.least} machines have waited for others in vain")
    least = max(goal.least, _for_deadline(goal, means))
    dearest = sorted(members, key=lambda one: (-one.usd_per_hour, one.id))
    if given := _given_back(goal, least, dearest, means, settled_s):
        return given
    missing = goal.most - count
    if missing <= 0:
        return Decision()
    needed = max(0, least - count)
    at_least = needed or next((more for more in range(1, missing) if goal.useful(count + more) > goal.useful(count)), missing)
    affordable = means.affordable_usd
    if affordable is None:
        return Decision(missing, needed, at_least)
    if count >= least and _mean(members) > affordable:
        return Decision(why=f"the budget lasts for ${affordable:.2f} per machine and hour, and those that train cost more")
    return Decision(missing, needed, at_least, affordable * (1 - _FLAPPING))


def _given_back(goal: Goal, least: int, dearest: Sequence[Member], means: Means, settled_s: float) -> Decision | None:
    full = [one for one in dearest if one.is_on_demand]
    beyond = min(len(dearest) - least, len(full))
    if beyond > 0 and (gone := _down_to_useful(goal, least, full[:beyond], len(dearest))):
        return Decision(end=gone, why="spot machines have taken the place of on-demand ones")
    affordable = means.affordable_usd
    if affordable is not None and _mean(dearest) > affordable + _EPSILON_USD:
        rest = list(dearest)
        while len(rest) > least and _mean(rest) > affordable and rest[0].usd_per_hour > affordable:
            rest = rest[1:]
        if gone := _down_to_useful(goal, least, dearest[: len(dearest) - len(rest)], len(dearest)):
            return Decision(
                end=gone,
                why=f"the budget lasts for ${affordable:.2f} per machine and hour, and they cost {_prices(dearest, gone)}",
            )
    idle = len(dearest) - goal.useful(len(dearest))
    if len(dearest) > least and idle > 0 and settled_s >= SPARE_S:
        gone = tuple(one.id for one in dearest[: min(idle, len(dearest) - least)])
        return Decision(
            end=gone, why=f"only {goal.useful(len(dearest))} of {len(dearest)} machines divide the samples of a step"
        )
    return None


def _down_to_useful(goal: Goal, least: int, candidates: Sequence[Member], count: int) -> tuple[str, ...]:
    """Return ids of the first of the candidates, as many as leave a number that trains; none that trains is made a spare."""
    for gone in range(len(candidates), 0, -1):
        left = count - gone
        if left >= least and (goal.useful(left) == left or goal.useful(left) == goal.useful(count)):
            return tuple(one.id for one in candidates[:gone])
    return ()


def _for_deadline(goal: Goal, means: Means) -> int:
    """Return how many machines finish the work before the deadline."""
    if means.deadline_h is None or means.machine_hours is None or means.deadline_h <= 0:
        return 0
    return min(goal.most, math.ceil(means.machine_hours / means.deadline_h))


def _mean(members: Sequence[Member]) -> float:
    return sum(one.usd_per_hour for one in members) / len(members) if members else 0.0


def _prices(members: Sequence[Member], ids: Sequence[str]) -> str:
    return ", ".join(f"${one.usd_per_hour:.2f}" for one in members if one.id in ids)


def affordable_machines(usd_per_hour: float, running_usd_per_hour: float, left_usd: float, hours: float) -> int:
    """Return how many more machines the budget covers for some hours, beside those that run.

    Args:
        usd_per_hour: price of one more machine.
        running_usd_per_hour: of all machines that run.
        left_usd: rest of the budget.
        hours: for which all of them must be covered.
    """
    if hours <= 0 or usd_per_hour <= 0:
        return 1_000_000
    return max(0, math.floor((left_usd / hours - running_usd_per_hour) / usd_per_hour + _EPSILON_USD))
