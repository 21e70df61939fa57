"""When to save next. Pure.

A save makes training stand still for ``δ`` seconds, and an interruption without a usable notice (none was heard, or it came
too late for a save and its upload) loses what was trained since the newest commit. One with a usable notice saves first, and
loses next to nothing. With a mean time ``M`` between interruptions, a share ``q`` of them without a usable notice, saves
after every ``τ`` seconds of training, ``u`` seconds from a save to its commit, ``e`` seconds spent on a usable notice and
``R`` seconds to start again, the share of time that is wasted is, as long as ``τ`` is short beside ``M``,

    w(τ) = δ/τ + [q·(τ/2 + u) + (1-q)·e + R] / M

``u``, ``e`` and ``R`` do not depend on ``τ``: they are paid whatever the cadence. The derivative is zero where
``δ/τ² = q/(2M)``, so

    τ* = √(2·δ·M/q)

With ``q = 1`` this is Young's interval [1]. Interruptions without a usable notice come as if there were no others, with mean
time ``M/q`` between them (a Poisson process, thinned), so Daly's correction [2] holds with ``M/q`` in the place of his ``M``:

    τ* = √(2·δ·M/q) · [1 + ⅓·√(δq/2M) + ⅑·(δq/2M)] - δ   where δ < 2M/q,   and M/q elsewhere

An announced interruption within the interval is a save for nothing, which makes the true optimum a little longer. Where ``τ*``
comes near to ``M`` it is missed most, and that costs a few hundredths of the waste: see `tests/policy/test_cadence.py`, which
simulates it.

``M`` and ``q`` are nobody's to publish. They start as settings and are learnt from what happened to the run (`learn`). The
waste is linear in the rate ``1/M`` and in ``q``, so the means of the two are all that has to be known of them.

[1] J. W. Young, A first order approximation to the optimum checkpoint interval, 1974: https://doi.org/10.1145/361147.361115
[2] J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, 2006, equation 37:
    https://doi.org/10.1016/j.future.2004.11.016
"""

from __future__ import annotations

import math
from dataclasses import dataclass

ASSUMED_STALL_S = 10.0  # until the first save has told: 1 to 2 s for each 10^9 bytes, where they are written by Trainer itself
_PRIOR_INTERRUPTIONS = 1.0  # the settings count as much as the first interruption that is seen…
_PRIOR_ANSWERS = 2.0  # …and as the first two that tell whether a notice was usable


@dataclass(frozen=True)
class SaveCost:
    """What a save of this training costs; None where nothing was measured yet.

    Args:
        stall_s: how long training stands still.
        commit_s: from the begin of a save to its commit.
    """

    stall_s: float | None = None
    commit_s: float | None = None


@dataclass(frozen=True)
class Interruptions:
    """What is expected of the machines.

    Args:
        mean_time_s: between two interruptions; positive.
        unannounced_share: of them, those without a usable notice; from 0 to 1.
    """

    mean_time_s: float
    unannounced_share: float


@dataclass(frozen=True)
class History:
    """What happened to a run.

    Args:
        uptime_s: seconds that its machines have lived together.
        announced: interruptions before which everything was committed.
        unannounced: those that lost something.
    """

    uptime_s: float = 0.0
    announced: int = 0
    unannounced: int = 0


def learn(prior: Interruptions, history: History) -> Interruptions:
    """What to expect, after what happened.

    The rate of interruptions has a gamma prior (shape 1, mean that of ``prior``), whose conjugate is the number of events of
    a Poisson process in a time; the unannounced share has a beta prior (weight 2, mean that of ``prior``), whose conjugate
    are successes and failures. The means of both after the fact are the result:
    https://en.wikipedia.org/wiki/Conjugate_prior

    Args:
        prior: from the settings.
        history: of this run.
    """
    seen = history.announced + history.unannounced
    rate = (_PRIOR_INTERRUPTIONS + seen) / (_PRIOR_INTERRUPTIONS * prior.mean_time_s + history.uptime_s)
    share = (_PRIOR_ANSWERS * prior.unannounced_share + history.unannounced) / (_PRIOR_ANSWERS + seen)
    return Interruptions(1 / rate, share)


def best_interval_s(stall_s: float, expected: Interruptions) -> float:
    """Seconds of training between two saves for which the least time is wasted: τ* of this module's docstring.

    Args:
        stall_s: how long a save makes training stand still; with 0 the answer is 0, because saves are then free.
        expected: of the machines; when every notice is usable the answer is infinite.
    """
    if expected.unannounced_share == 0:
        return math.inf
    apart_s = expected.mean_time_s / expected.unannounced_share
    x = stall_s / (2 * apart_s)
    if x >= 1:
        return apart_s
    return math.sqrt(2 * stall_s * apart_s) * (1 + math.sqrt(x) / 3 + x / 9) - stall_s


def next_save_s(cost: SaveCost, expected: Interruptions, max_interval_s: float, scheduled_s: float | None = None) -> float:
    """Seconds after the end of a save at which the next is due; infinite when the one that is scheduled comes soon enough.

    Never sooner than the commit of the save before, so that uploads don't queue; else never later than ``max_interval_s``.
    Between two scheduled saves the added ones stand evenly: right before a scheduled one another would be wasted.

    Args:
        cost: of a save.
        expected: of the machines.
        max_interval_s: that may pass without a save.
        scheduled_s: seconds after the save at which training will save anyway; None when that is not known.
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
