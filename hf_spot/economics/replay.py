"""Replaying a real run in the simulator, to see how well the simulator predicts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import fmean, median

from hf_spot.economics.plan import Rung
from hf_spot.economics.report import newest_timings, summarise
from hf_spot.economics.simulate import Training, run
from hf_spot.economics.table import duration
from hf_spot.economics.traces import Trace
from hf_spot.errors import ConfigError
from hf_spot.policy import cadence
from hf_spot.run.journal import Entry


@dataclass(frozen=True)
class Replay:
    """A run compared with its simulation.

    Args:
        goodput: goodput of the run.
        predicted: goodput of the simulation.
        wall_s: wall time of the run.
        predicted_wall_s: wall time of the simulation.
    """

    goodput: float
    predicted: float
    wall_s: float
    predicted_wall_s: float

    def __str__(self) -> str:
        return (
            f"goodput {100 * self.goodput:.1f}% in {duration(self.wall_s)}; simulated with the run's means and its machines: "
            f"{100 * self.predicted:.1f}% in {duration(self.predicted_wall_s)}"
        )


def replay(entries: Iterable[Entry]) -> Replay:
    """Simulate a run with the means of its journal, on machines that start and end as the run's machines did.

    A launch without a recorded end lived for some time after its last entry; half the time between two saves is assumed.

    Raises:
        ConfigError: the journal has too little data: nothing was measured, or nothing committed.
    """
    kept = list(entries)
    report = summarise(kept)
    launches = [launch for launch in report.launches if launch.measured]
    commits = [entry.data for entry in kept if entry.kind == "commit" and entry.data.get("upload_s") is not None]
    steps = report.committed_step
    timings = [timing for launch in launches for timing in newest_timings(launch).values() if timing.steps]
    if not steps or not timings or not commits:
        raise ConfigError(
            "this run's journal has too little data for a replay: no training in it was measured and committed",
            hint="hf-spot report RUN shows the data of the journal",
        )
    step_s = sum(timing.steps_s for timing in timings) / sum(timing.steps for timing in timings)
    gaps = [
        after.step - before.step
        for launch in launches
        for before, after in zip(launch.marks[1:], launch.marks[2:], strict=False)
        if after.step > before.step
    ]
    interval_s = (median(gaps) if gaps else steps) * step_s
    warnings = [
        (launch.last_heard - launch.terminated_since).total_seconds() for launch in report.launches if launch.terminated_since
    ]
    training = Training(
        work_s=steps * step_s,
        start_s=fmean(timing.first_step_s for timing in timings),
        stall_s=fmean(commit.get("stall_s") or 0.0 for commit in commits),
        commit_s=fmean((commit.get("save_s") or 0.0) + commit["upload_s"] for commit in commits),
        warning_s=fmean(warnings) if warnings else math.inf,
        expected=cadence.Interruptions(math.inf, 0.0),
        interval_s=interval_s,
        retry_s=0.0,
    )
    began = report.launches[0].began
    spells = []
    for number, launch in enumerate(report.launches):
        end_s = (launch.last_heard - began).total_seconds()
        if launch.ended == "no word" and number + 1 < len(report.launches):
            end_s += min(report.launches[number + 1].waited_s, (interval_s + training.stall_s) / 2)
        spells.append(((launch.began - began).total_seconds(), end_s))
    spells[-1] = (spells[-1][0], math.inf)
    unannounced = iter([launch.terminated_since is None for launch in report.launches])
    trace = Trace(tuple(begin for begin, _ in spells), tuple(end for _, end in spells), math.inf)
    rung = Rung(0.0, "", "")
    # In the run a notice became a commit, so it does in the simulation, even if the mean times say otherwise.
    answered = any(commit.get("reason") == "notice" for commit in commits)
    training = replace(training, commit_s=min(training.commit_s, training.warning_s)) if answered else training
    outcome = run(training, [(rung, [trace])], 0.0, lambda: next(unannounced, True))
    return Replay(report.goodput or 0.0, outcome.goodput, report.wall_s, outcome.wall_s)
