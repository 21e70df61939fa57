"""The timeline of a run: launches as bars over time, and the loss as points above them. Pure."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

from hf_spot.economics.report import Launch, Report, Timing, name_of, newest_timings

_FINEST = 400  # maximum number of bars for a launch's steps and saves
_MOST_LANES = 24
_KIND_OF_MACHINE = ("instance_type", "zone", "market")
WAITING_LANE = "no machine"


@dataclass(frozen=True)
class Bar:
    """One interval in one lane.

    Args:
        lane: the machine.
        part: use of the time (`hf_spot.economics.report.PARTS`, or ``waiting``).
        begin_s: seconds since the first claim.
        length_s: seconds.
    """

    lane: str
    part: str
    begin_s: float
    length_s: float


@dataclass(frozen=True)
class Timeline:
    """The data for a plot of a run.

    Args:
        began: time of the first claim.
        lanes: machines, in the order of their first launch.
        bars: intervals that cover the time from the first claim to the last entry.
        losses: for each launch, seconds since the first claim and the loss, of its steps that count.
        interruptions: seconds since the first claim, and a word or two.
        trainings: for each of ``losses``, the number of its training.
        lost: steps that were done and not committed: seconds since the first claim at their beginning and end, and how many.
    """

    began: datetime
    lanes: tuple[str, ...]
    bars: tuple[Bar, ...]
    losses: tuple[tuple[tuple[float, float], ...], ...]
    interruptions: tuple[tuple[float, str], ...]
    trainings: tuple[int, ...] = ()
    lost: tuple[tuple[float, float, int], ...] = ()


def losses_in(trainer_state: bytes) -> dict[int, float]:
    """Return the loss by step from the bytes of a ``trainer_state.json``; empty if there is none."""
    try:
        logged = json.loads(trainer_state)["log_history"]
        found = [(line["step"], line["loss"]) for line in logged if "step" in line and "loss" in line]
    except (ValueError, KeyError, TypeError):
        return {}
    return {step: float(loss) for step, loss in found if isinstance(step, int) and isinstance(loss, (int, float))}


def make_timeline(
    report: Report, losses: dict[int, float], training: int = 1, others: Mapping[int, dict[int, float]] | None = None
) -> Timeline:
    """Return the timeline of a report with at least one launch.

    Steps and saves are in order; unmeasured time is at the end of its launch.

    Args:
        report: report of the run.
        losses: loss by step.
        training: number of the training that these steps belong to.
        others: of other trainings, by their numbers.
    """
    launches = report.launches
    began = launches[0].began
    lanes_of = _lanes_of(launches)
    bars: list[Bar] = []
    for launch, names in zip(launches, lanes_of, strict=True):
        begin_s = (launch.began - began).total_seconds()
        if launch.waited_s > 0:
            bars.append(Bar(WAITING_LANE, "waiting", begin_s - launch.waited_s, launch.waited_s))
        for part, length_s in _intervals(launch):
            if length_s > 0:
                bars += [Bar(lane, part, begin_s, length_s) for lane in names]
                begin_s += length_s
    interruptions = [
        ((launch.last_heard - began).total_seconds(), launch.ended)
        for launch in launches
        if launch.ended in ("preempted", "failed") or (launch.ended == "no word" and launch is not launches[-1])
    ]
    lanes = [
        *dict.fromkeys(lane for names in lanes_of for lane in names),
        *([WAITING_LANE] if any(bar.part == "waiting" for bar in bars) else []),
    ]
    curves = [
        (number, curve)
        for number, of_it in sorted({**(others or {}), training: losses}.items())
        for curve in _place([launch for launch in launches if launch.training == number], of_it, began)
    ]
    return Timeline(
        began,
        tuple(lanes),
        tuple(bars),
        tuple(curve for _, curve in curves),
        tuple(interruptions),
        tuple(number for number, _ in curves),
        tuple(_lost(launches, began)),
    )


def _lost(launches: Sequence[Launch], began: datetime) -> Iterator[tuple[float, float, int]]:
    """Yield when steps were done that a later launch did again, or would have."""
    for launch, after in pairwise(launches):
        steps = launch.steps_lost if launch.steps_lost is not None else after.steps_redone
        knots = _knots(launch)
        if steps and len(knots) > 1:
            offset_s = (launch.began - began).total_seconds()
            begin_s = max((at_s for step, at_s in knots if step <= launch.committed_step), default=knots[0][1])
            yield offset_s + begin_s, offset_s + launch.wall_s, steps


def _lanes_of(launches: Sequence[Launch]) -> list[list[str]]:
    """Return the lanes of each launch: its machines or, if these are too many, their instance types, zones and markets."""
    machines = [
        [(launch.name, launch.machine), *((name_of(one), one["machine"]) for one in launch.others)] for launch in launches
    ]
    lanes = [_told_apart([name for name, _ in of_launch]) for of_launch in machines]
    if _number_of(lanes) > _MOST_LANES:
        kinds = [[" ".join(str(one.get(key) or "?") for key in _KIND_OF_MACHINE) for _, one in found] for found in machines]
        lanes = [list(dict.fromkeys(of_launch)) for of_launch in kinds]
    if _number_of(lanes) > _MOST_LANES:
        lanes = [["machines"]] * len(lanes)
    return lanes


def _number_of(lanes: Sequence[Sequence[str]]) -> int:
    return len({lane for of_launch in lanes for lane in of_launch})


def _told_apart(names: Sequence[str]) -> list[str]:
    """Return the names of the machines of one launch, with a number where two have the same (containers, clones)."""
    return [f"{name} ({count})" if (count := names[: at + 1].count(name)) > 1 else name for at, name in enumerate(names)]


def _intervals(launch: Launch) -> list[tuple[str, float]]:
    """Return the parts of a launch as consecutive intervals; they add up to its parts."""
    parts = launch.parts
    found = [("idle", parts["idle"]), ("restoring", parts["restoring"]), ("starting", parts["starting"])]
    measured = [(mark.training, mark.timing) for mark in launch.marks if mark.timing is not None]
    thinned = [*measured[:: max(1, len(measured) // _FINEST)], *measured[-1:]]
    gains = []
    before = (0, Timing())
    for training, timing in thinned:
        last = before[1] if training == before[0] else Timing()
        gains.append((max(0.0, timing.steps_s - last.steps_s), max(0.0, timing.stalled_s - last.stalled_s)))
        before = (training, timing)
    # Scale to the launch's parts: a changed clock, or the estimate of the last steps, may have altered the sums.
    trained_s, saved_s = (sum(gain[at] for gain in gains) or 1.0 for at in (0, 1))
    left_to_redo_s = parts["redoing"]
    for train_s, save_s in gains:
        steps_s = (parts["training"] + parts["redoing"]) * train_s / trained_s
        redone_s = min(left_to_redo_s, steps_s)
        left_to_redo_s -= redone_s
        found += [("redoing", redone_s), ("training", steps_s - redone_s), ("saving", parts["saving"] * save_s / saved_s)]
    return [*found, ("other", parts["other"]), ("ending", parts["ending"])]


def _place(launches: Sequence[Launch], losses: dict[int, float], began: datetime) -> list[tuple[tuple[float, float], ...]]:
    """Return each loss at the time when its step was done for the last time."""
    curves = []
    wanted = sorted(losses)
    for launch in reversed(launches):
        offset_s = (launch.began - began).total_seconds()
        knots = _knots(launch)
        steps = [step for step, _ in knots]
        points = []
        while wanted and wanted[-1] > launch.resumed_step:
            step = wanted.pop()
            after = min(bisect_right(steps, step - 1), len(knots) - 1)
            (low, low_s), (high, high_s) = knots[max(0, after - 1)], knots[after]
            at_s = high_s if high <= low else low_s + (high_s - low_s) * min(1.0, (step - low) / (high - low))
            points.append((offset_s + at_s, losses[step]))
        curves.append(tuple(reversed(points)))
    return [curve for curve in reversed(curves) if curve]


def _knots(launch: Launch) -> list[tuple[int, float]]:
    """Return the steps that were reached, and their seconds since the launch began; both ascending."""
    held_before_s = (launch.marks[0].time - launch.began).total_seconds()
    timing = newest_timings(launch).get(launch.training)
    knots = [(launch.resumed_step, min(held_before_s + (timing.first_step_s if timing else 0.0), launch.wall_s))]
    for mark in launch.marks[1:]:
        at_s = (mark.time - launch.began).total_seconds() if mark.timing is None else held_before_s + mark.timing.elapsed_s
        if mark.training == launch.training and mark.step > knots[-1][0]:
            knots.append((mark.step, min(max(at_s, knots[-1][1]), launch.wall_s)))
    return knots
