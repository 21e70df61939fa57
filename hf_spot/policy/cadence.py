"""When to save next. Pure.

A save pauses training for ``δ`` seconds. An interruption without a usable notice (none was detected, or it came too late
for a save and its upload) loses what was trained since the newest commit. One with a usable notice saves first, and loses
almost nothing. With a mean time ``M`` between interruptions, a share ``q`` of them without a usable notice, saves
after every ``τ`` seconds of training, ``u`` seconds from a save to its commit, ``e`` seconds spent on a usable notice and
``R`` seconds to start again, the wasted share of time is, for ``τ`` short compared with ``M``,

    w(τ) = δ/τ + [q·(τ/2 + u) + (1-q)·e + R] / M

``u``, ``e`` and ``R`` do not depend on ``τ``: they cost the same at every cadence. The derivative is zero where
``δ/τ² = q/(2M)``, so

    τ* = √(2·δ·M/q)

With ``q = 1`` this is Young's interval [1]. Interruptions without a usable notice are independent of the others, with mean
time ``M/q`` between them (a thinned Poisson process), so what Daly minimizes [2] holds with ``M/q`` in place of Daly's ``M``.
Its derivative is zero where

    τ* = y·M/q,   -ln(1 - y) - y = δq/M,   0 < y < 1

This is solved as it is: Daly's own approximation falls near ``δ = 2M/q``, where a longer ``M`` would give a shorter ``τ*``.

An announced interruption shortly after a save makes that save useless, so the true optimum is a little longer. The error is
largest where ``τ*`` is close to ``M``, and costs a few hundredths of the waste: `tests/policy/test_cadence.py` simulates it.

No cloud publishes ``M`` and ``q``. They start as settings and are learnt from the history of the run (`learn`). The waste
is linear in the rate ``1/M`` and in ``q``, so only the means of the two are needed.

[1] J. W. Young, A first order approximation to the optimum checkpoint interval, 1974: https://doi.org/10.1145/361147.361115
[2] J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, 2006:
    https://doi.org/10.1016/j.future.2004.11.016
"""

from __future__ import annotations

import math
from dataclasses import dataclass

ADDED = "cadence"  # the reason of a save that is added to Trainer's own
ASSUMED_STALL_S = 10.0  # until the first save is measured, if nobody knows how large it is
# ... else: a tenth of a second per 10^9 bytes if they are copied, 1 to 2 s if Trainer itself writes them.
_ASSUMED_S, _ASSUMED_BYTES_PER_S = 0.1, 2e9
_ROOM = 2.5  # checkpoints that must fit on a disk
_PRIOR_INTERRUPTIONS = 1.0  # the settings weigh as much as the first observed interruption…
_PRIOR_ANSWERS = 2.0  # …and as the first two that show whether a notice was usable


@dataclass(frozen=True)
class SaveCost:
    """The measured cost of a save of this training; None where nothing has been measured yet.

    Args:
        stall_s: seconds for which training pauses.
        commit_s: seconds from the start of a save to its commit.
    """

    stall_s: float | None = None
    commit_s: float | None = None


@dataclass(frozen=True)
class Interruptions:
    """The expected interruptions of the machines.

    Args:
        mean_time_s: mean seconds between two interruptions; positive.
        unannounced_share: share of interruptions without a usable notice; from 0 to 1.
    """

    mean_time_s: float
    unannounced_share: float


@dataclass(frozen=True)
class History:
    """The past interruptions of a run.

    Args:
        uptime_s: total lifetime of its machines in seconds.
        announced: number of interruptions before which everything was committed.
        unannounced: number of interruptions that lost something.
    """

    uptime_s: float = 0.0
    announced: int = 0
    unannounced: int = 0


def learn(prior: Interruptions, history: History) -> Interruptions:
    """Return the interruptions to expect, given the run's history.

    The rate of interruptions has a gamma prior (shape 1, mean that of ``prior``), whose conjugate is the number of events of
    a Poisson process in a time; the unannounced share has a beta prior (weight 2, mean that of ``prior``), whose conjugate
    are successes and failures. The result is the posterior mean of both:
    https://en.wikipedia.org/wiki/Conjugate_prior

    Args:
        prior: expectation from the settings.
        history: history of this run.
    """
    seen = history.announced + history.unannounced
    rate = (_PRIOR_INTERRUPTIONS + seen) / (_PRIOR_INTERRUPTIONS * prior.mean_time_s + history.uptime_s)
    share = (_PRIOR_ANSWERS * prior.unannounced_share + history.unannounced) / (_PRIOR_ANSWERS + seen)
    return Interruptions(1 / rate, share)


def best_interval_s(stall_s: float, expected: Interruptions) -> float:
    """Return the seconds of training between two saves that waste the least time: τ* in the module's docstring.

    Args:
        stall_s: seconds for which a save pauses training; 0 gives 0, because saves are then free.
        expected: expected interruptions; if every notice is usable, the result is infinite.
    """
    if expected.unannounced_share == 0:
        return math.inf
    apart_s = expected.mean_time_s / expected.unannounced_share
    return apart_s * _solved(stall_s / apart_s)


def _solved(cost: float) -> float:
    """Return the ``y`` for which ``-ln(1 - y) - y`` is ``cost``, by Newton's method from above, where it can't miss.

    ``y ≤ √(2·cost)``, since the left side is at least ``y²/2``; and ``y ≤ 1 - exp(-1 - cost)``, since ``y < 1``.
    """
    y = min(math.sqrt(2 * cost), -math.expm1(-1 - cost))
    for _ in range(60):
        if not 0 < y < 1:  # nothing to pay, or too much to tell it from 1
            break
        step = (-math.log1p(-y) - y - cost) * (1 - y) / y
        if abs(step) <= 1e-15 * y:
            break
        y -= step
    return y


def assumed_stall_s(size_bytes: int) -> float:
    """Return the seconds for which the first save of a training may stop it.

    Args:
        size_bytes: of the checkpoint, as far as it is known.
    """
    return _ASSUMED_S + size_bytes / _ASSUMED_BYTES_PER_S


def lacks_room(free_bytes: int, size_bytes: int) -> bool:
    """Return whether a disk is too full for an added save: the next one of Trainer must still find its place beside it.

    Args:
        free_bytes: that the disk has.
        size_bytes: of a checkpoint.
    """
    return free_bytes < _ROOM * size_bytes


def next_save_s(cost: SaveCost, expected: Interruptions, max_interval_s: float, scheduled_s: float | None = None) -> float:
    """Return the seconds from the end of a save to the next one; infinite if the scheduled save comes soon enough.

    Never sooner than the commit of the previous save, so that uploads don't queue; otherwise never later than
    ``max_interval_s``. Added saves are spread evenly between two scheduled ones: one right before a scheduled save would be
    wasted.

    Args:
        cost: cost of a save.
        expected: expected interruptions.
        max_interval_s: maximum seconds without a save.
        scheduled_s: seconds from the save to the next scheduled one; None if unknown.
    """
    stall_s = ASSUMED_STALL_S if cost.stall_s is None else cost.stall_s
    shortest_s = 0.0 if cost.commit_s is None else cost.commit_s
    wanted_s = max(shortest_s, min(max_interval_s, best_interval_s(stall_s, expected)))
    if scheduled_s is None or wanted_s <= 0:
        return wanted_s
    parts = max(round(scheduled_s / wanted_s), math.ceil(scheduled_s / max(shortest_s, max_interval_s)))
    if shortest_s > 0:
        parts = min(parts, math.floor(scheduled_s / shortest_s))
    return scheduled_s / parts if parts > 1 else math.inf
