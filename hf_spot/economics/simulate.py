"""The expected cost and duration of a plan, from simulated trainings that use the same policies as real ones.

A new machine starts, restores, and trains. It saves when `hf_spot.policy.cadence` (or the plan) says so, and is taken away when
its zone runs out of capacity. `hf_spot.policy.preemption` decides how to act on a notice, and `hf_spot.policy.deadline` how to
meet a deadline. Nothing else happens while a machine runs, so each one is a single calculation.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from hf_spot.economics.plan import ON_DEMAND, Plan, Row, Rung, zones_of
from hf_spot.economics.traces import ALWAYS, YEAR_S, Trace, model
from hf_spot.notices.notice import NoticeKind
from hf_spot.policy import cadence, deadline
from hf_spot.policy.deadline import Market, Progress
from hf_spot.policy.preemption import Action, Measured, decide

_JOBS_A_YEAR = 1000  # that share one simulated year of capacity; more trainings get further years
_HOPELESS = 200.0  # a training that takes this many times its work is aborted


@dataclass(frozen=True)
class Training:
    """The parameters of a training, in seconds; `hf_spot.economics.plan.Plan` explains them.

    Args:
        work_s: uninterrupted training, without saves.
        start_s: from getting a machine to the first step.
        stall_s: pause of the training for a save.
        commit_s: from the start of a save to its commit.
        warning_s: between a notice and the end of the machine.
        expected: expected interruptions before any have been observed.
        interval_s: training between two saves; None for `hf_spot.policy.cadence`.
        longest_s: the longest interval that the cadence may choose.
        retry_s: between two attempts to get a machine.
    """

    work_s: float
    start_s: float
    stall_s: float
    commit_s: float
    warning_s: float
    expected: cadence.Interruptions
    interval_s: float | None = None
    longest_s: float = 1800.0
    retry_s: float = 60.0

    @classmethod
    def of(cls, plan: Plan) -> Training:
        """Return the training that a plan describes."""
        return cls(
            work_s=plan.work_hours * 3600,
            start_s=plan.start_minutes * 60,
            stall_s=plan.save_stall_seconds,
            commit_s=plan.commit_seconds,
            warning_s=plan.warning_seconds,
            expected=cadence.Interruptions(plan.mean_hours_between_interruptions * 3600, plan.unannounced_share),
            interval_s=None if plan.save_every_minutes is None else plan.save_every_minutes * 60,
            longest_s=plan.max_save_minutes * 60,
            retry_s=plan.retry_minutes * 60,
        )

    def saves_on_notice(self) -> bool:
        """Return whether a notice leaves enough time for a commit."""
        size_bytes = 1 << 30  # arbitrary: only the time matters
        upload_s = self.commit_s - self.stall_s
        rate = size_bytes / upload_s if upload_s else math.inf
        measured = Measured(save_s=self.stall_s, size_bytes=size_bytes, bytes_per_s=rate)
        decision = decide(NoticeKind.TERMINATE, self.warning_s, measured)
        return decision.action is Action.SAVE_AND_STOP and self.commit_s <= self.warning_s


@dataclass
class Outcome:
    """The result of one training, in seconds.

    Args:
        wall_s: from the first request for a machine to the last commit.
        held_s: part of it with a machine.
        useful_s: training steps done for the first time.
        lost_s: training steps that were done and lost.
        on_demand_s: part of ``held_s`` on on-demand machines.
        usd: cost in dollars.
        interruptions: number of machines that were taken away.
        late: whether it missed its deadline.
        finished: whether it finished at all.
    """

    wall_s: float = 0.0
    held_s: float = 0.0
    useful_s: float = 0.0
    lost_s: float = 0.0
    on_demand_s: float = 0.0
    usd: float = 0.0
    interruptions: int = 0
    late: bool = False
    finished: bool = True

    @property
    def goodput(self) -> float:
        """Return the share of the wall time spent on steps done for the first time."""
        return self.useful_s / self.wall_s if self.wall_s else 1.0


Pools = Sequence[tuple[Rung, Sequence[Trace]]]


def run(
    training: Training,
    pools: Pools,
    began_s: float,
    unannounced: Callable[[], bool],
    deadline_s: float | None = None,
) -> Outcome:
    """Simulate one training, from the first request for a machine to its last commit.

    Args:
        training: parameters of the training.
        pools: a ladder: rungs, and the traces of their zones. Of a rung's zones with capacity, the one that has it most often
            is used, in line with AWS's placement scores.
        began_s: its start on the traces' clock.
        unannounced: returns, for each interruption, whether it comes without a notice.
        deadline_s: deadline after the start; None for none.
    """
    job = _Job(training, pools, began_s, unannounced, deadline_s)
    while job.done_s < training.work_s - 1e-6:
        if job.now_s - began_s > _HOPELESS * (training.work_s + training.start_s):
            job.outcome.finished = False
            break
        job.advance()
    job.outcome.wall_s = job.now_s - began_s
    job.outcome.useful_s = job.done_s
    job.outcome.late = deadline_s is not None and job.outcome.wall_s > deadline_s
    return job.outcome


class _Job:
    """A running training: ``done_s`` seconds of its work are committed at ``now_s``."""

    def __init__(
        self,
        training: Training,
        pools: Pools,
        began_s: float,
        unannounced: Callable[[], bool],
        deadline_s: float | None,
    ) -> None:
        self.training = training
        self.began_s = self.now_s = began_s
        self.done_s = 0.0
        self.outcome = Outcome()
        self._unannounced = unannounced
        self._deadline_s = deadline_s
        self._saves_on_notice = training.saves_on_notice()
        self._history = cadence.History()
        full = [rung for rung, _ in pools if rung.market == ON_DEMAND]
        # A deadline decides when to use on-demand machines; without one, an on-demand rung is like any other.
        self._full = full[0] if full and deadline_s is not None else None
        self._pools = [
            (rung, (ALWAYS,) if rung.market == ON_DEMAND else sorted(traces, key=lambda trace: -trace.availability))
            for rung, traces in pools
            if self._full is None or rung.market != ON_DEMAND
        ]

    def advance(self) -> None:
        """Advance to the end of a machine, or of a wait for one."""
        found = self._find()
        if self._full is None:
            if found is None:
                self._wait(math.inf)
            else:
                self._spell(found[0], found[1])
            return
        progress = self._progress()
        market = deadline.choose(progress, Market.NONE, spot=found is not None)
        if market is Market.SPOT and found is not None:
            self._spell(found[0], found[1])
        elif market is Market.ON_DEMAND:
            self._on_demand(self._full)
        else:
            self._wait(self.now_s + max(1.0, deadline.holds_s(progress, Market.NONE)))

    def _progress(self) -> Progress:
        training = self.training
        interval_s = self._interval_s()
        dilated = 1 + (training.stall_s / interval_s if interval_s else 0.0)
        again_s = training.start_s + min(interval_s, training.work_s) + training.commit_s
        whole_s = training.work_s * dilated + training.start_s + training.commit_s
        left_s = (training.work_s - self.done_s) * dilated + training.start_s + training.commit_s
        return Progress(whole_s, whole_s - left_s, self.now_s - self.began_s, self._deadline_s or math.inf, again_s)

    def _find(self) -> tuple[Rung, float] | None:
        """Return the first rung with capacity now, and the end of that capacity."""
        for rung, traces in self._pools:
            for trace in traces:
                begin_s, end_s = trace.next_up(self.now_s)
                if begin_s <= self.now_s:
                    return rung, end_s
        return None

    def _wait(self, until_s: float) -> None:
        """Wait, with repeated requests, until there is capacity or until ``until_s``."""
        retry_s = self.training.retry_s
        soonest_s = math.inf
        for _, traces in self._pools:
            for trace in traces:
                at_s = self.now_s
                while at_s < soonest_s:
                    begin_s, end_s = trace.next_up(at_s)
                    tries = math.ceil((begin_s - self.now_s) / retry_s) if retry_s and begin_s < math.inf else 0
                    retry_at_s = max(begin_s, self.now_s + tries * retry_s)
                    if retry_at_s < end_s or begin_s == math.inf:
                        soonest_s = min(soonest_s, retry_at_s)
                        break
                    at_s = end_s
        target_s = min(soonest_s, until_s)
        if target_s == math.inf:  # never: the caller aborts
            target_s = self.began_s + 2 * _HOPELESS * (self.training.work_s + self.training.start_s)
        self.now_s = max(target_s, math.nextafter(self.now_s, math.inf))

    def _interval_s(self) -> float:
        training = self.training
        if training.interval_s is not None:
            return training.interval_s
        expected = cadence.learn(training.expected, self._history)
        return cadence.next_save_s(cadence.SaveCost(training.stall_s, training.commit_s), expected, training.longest_s)

    def _spell(self, rung: Rung, end_s: float) -> None:
        """Train on a machine until it is taken away at ``end_s``, or no longer needed."""
        training, outcome = self.training, self.outcome
        interval_s = self._interval_s()
        left_s = (training.work_s - self.done_s) / rung.speed
        needed_s = training.start_s + _with_saves(left_s, interval_s, training.stall_s) + training.commit_s
        lived_s = end_s - self.now_s
        if needed_s <= lived_s:
            self._pay(rung, needed_s)
            self.done_s = training.work_s
            return
        ran_s = lived_s - training.start_s
        announced = not self._unannounced()
        usable = announced and self._saves_on_notice
        stops_s = ran_s - training.warning_s if announced else ran_s
        trained_s = min(left_s, _without_saves(stops_s, interval_s, training.stall_s))
        kept_s = trained_s if usable else min(left_s, _committed(ran_s, stops_s, interval_s, training))
        outcome.interruptions += 1
        outcome.lost_s += (trained_s - kept_s) * rung.speed
        self.done_s += kept_s * rung.speed
        self._history = replace(
            self._history,
            uptime_s=self._history.uptime_s + lived_s,
            announced=self._history.announced + usable,
            unannounced=self._history.unannounced + (not usable),
        )
        self._pay(rung, lived_s)

    def _on_demand(self, rung: Rung) -> None:
        """Train on an on-demand machine as long as the deadline requires it."""
        training = self.training
        interval_s = self._interval_s()
        left_s = (training.work_s - self.done_s) / rung.speed
        needed_s = training.start_s + _with_saves(left_s, interval_s, training.stall_s) + training.commit_s
        progress = self._progress()
        held_s = training.start_s
        ahead = replace(progress, elapsed_s=progress.elapsed_s + training.start_s)
        if deadline.choose(ahead, Market.ON_DEMAND, spot=True) is not Market.ON_DEMAND:
            held_s += training.commit_s
        else:
            held_s += deadline.holds_s(ahead, Market.ON_DEMAND) + training.commit_s
        final = progress.slack_s <= 2 * progress.change_s
        if final or held_s >= needed_s:
            self._pay(rung, needed_s)
            self.done_s = training.work_s
            return
        trained_s = _without_saves(held_s - training.start_s - training.commit_s, interval_s, training.stall_s)
        self.done_s += trained_s * rung.speed
        self._pay(rung, held_s)

    def _pay(self, rung: Rung, held_s: float) -> None:
        self.now_s += held_s
        self.outcome.held_s += held_s
        self.outcome.usd += held_s / 3600 * rung.usd_per_hour
        if rung.market == ON_DEMAND:
            self.outcome.on_demand_s += held_s


def _with_saves(trained_s: float, interval_s: float, stall_s: float) -> float:
    """Return the seconds that some seconds of training take with the saves between them, without the final save."""
    return trained_s + max(0, math.ceil(trained_s / interval_s) - 1) * stall_s if interval_s else trained_s


def _without_saves(ran_s: float, interval_s: float, stall_s: float) -> float:
    """Return the seconds of training that fit into a time with saves."""
    if ran_s <= 0 or not interval_s:
        return max(0.0, ran_s)
    saves, rest_s = divmod(ran_s, interval_s + stall_s)
    return saves * interval_s + min(rest_s, interval_s)


def _committed(ran_s: float, stops_s: float, interval_s: float, training: Training) -> float:
    """Return the seconds of training that are committed at the end, if training stops at ``stops_s`` without a save."""
    if min(ran_s, stops_s) <= 0:
        return 0.0
    if not interval_s:
        return max(0.0, min(stops_s, ran_s - training.commit_s))
    cycle_s = interval_s + training.stall_s
    saves = min((ran_s - training.commit_s + training.stall_s) // cycle_s, (stops_s + training.stall_s) // cycle_s)
    return max(0.0, saves) * interval_s


# -- many trainings ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """The distribution of a number over the trainings: its mean, and its 10% and 90% quantiles."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Return the spread of at least one value."""
        ordered = sorted(values)
        last = len(ordered) - 1
        return cls(fmean(ordered), ordered[round(last * 0.1)], ordered[round(last * 0.9)])


@dataclass(frozen=True)
class Result:
    """The result of one row.

    Args:
        row: the row of the plan.
        planned_hours: the plan's hours of training.
        formula: hours times price of its first rung, as text.
        listed_usd: the result of the formula: the cost without interruptions, starts and saves.
        hours: wall-clock hours.
        usd: cost in dollars.
        goodput: mean goodput.
        extra_share: additional wall-clock time as a share of the plan's work: 0.12 is 12% more.
        interruptions: mean number of interruptions.
        lost_hours: mean hours of training that were done twice.
        on_demand_share: share of the machine time on on-demand machines.
        late_share: share of trainings that missed their deadline.
        unfinished_share: share of trainings that were aborted.
    """

    row: Row
    planned_hours: float
    formula: str
    listed_usd: float
    hours: Spread
    usd: Spread
    goodput: float
    extra_share: float
    interruptions: float
    lost_hours: float
    on_demand_share: float
    late_share: float
    unfinished_share: float

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def simulate(plan: Plan, traces: Mapping[str, Trace] | None = None, *, jobs: int = 1000, seed: int = 0) -> list[Result]:
    """Simulate every row of a plan on the same capacity.

    Args:
        plan: the plan.
        traces: traces of zones; None for the model (`hf_spot.economics.traces.model`).
        jobs: number of trainings per row; they begin at random times.
        seed: seed of all randomness.

    Raises:
        ConfigError: a rung names a zone without a trace.
    """
    training = Training.of(plan)
    zones = _capacity(plan, traces, jobs, seed, training.work_s)
    starts = random.Random(f"starts {seed}")
    length_s = max((trace.length_s for each in zones.values() for trace in each.values()), default=YEAR_S)
    begins = [starts.uniform(0, length_s) for _ in range(jobs)]
    found = []
    for row in plan.rows:
        pools = [
            (rung, [zones[rung.instance_type][name] for name in zones_of(rung, zones[rung.instance_type])])
            for rung in row.ladder
        ]
        deadline_s = None if row.deadline_hours is None else row.deadline_hours * 3600
        coins = (_coin(f"{seed} {number}", plan.unannounced_share) for number in range(jobs))
        outcomes = [run(training, pools, began_s, coin, deadline_s) for began_s, coin in zip(begins, coins, strict=True)]
        found.append(_summarised(row, plan, outcomes))
    return found


def _coin(seed: str, share: float) -> Callable[[], bool]:
    dice = random.Random(seed)
    return lambda: dice.random() < share


def _capacity(
    plan: Plan, traces: Mapping[str, Trace] | None, jobs: int, seed: int, work_s: float
) -> dict[str, Mapping[str, Trace]]:
    """Return the traces of each instance type."""
    kinds = list(dict.fromkeys(rung.instance_type for row in plan.rows for rung in row.ladder))
    if traces is not None:
        return dict.fromkeys(kinds, traces)
    import numpy as np

    length_s = YEAR_S * max(1, math.ceil(jobs / _JOBS_A_YEAR), math.ceil(10 * work_s / YEAR_S))
    return {kind: model(np.random.default_rng([seed, number]), length_s) for number, kind in enumerate(kinds)}


def _summarised(row: Row, plan: Plan, outcomes: Sequence[Outcome]) -> Result:
    price = row.ladder[0].usd_per_hour
    hours = Spread.of(one.wall_s / 3600 for one in outcomes)
    held_s = sum(one.held_s for one in outcomes)
    return Result(
        row=row,
        planned_hours=plan.work_hours,
        formula=f"{plan.work_hours:g} h x ${price:.2f}/h = ${plan.work_hours * price:,.2f}",
        listed_usd=plan.work_hours * price,
        hours=hours,
        usd=Spread.of(one.usd for one in outcomes),
        goodput=sum(one.useful_s for one in outcomes) / sum(one.wall_s for one in outcomes),
        extra_share=hours.mean / plan.work_hours - 1,
        interruptions=fmean(one.interruptions for one in outcomes),
        lost_hours=fmean(one.lost_s for one in outcomes) / 3600,
        on_demand_share=sum(one.on_demand_s for one in outcomes) / held_s if held_s else 0.0,
        late_share=fmean(one.late for one in outcomes),
        unfinished_share=fmean(not one.finished for one in outcomes),
    )
