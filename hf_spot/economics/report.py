"""What happened to a run, where its time went and what it cost, read from its journal alone.

Every second between the first claim and the last word belongs to exactly one part of one launch, or to the wait between two
launches: the parts add up to the wall time. A second counts once, for the machine that wrote the journal; where several
train together, it is paid that many times.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from hf_spot.notices.notice import NoticeKind
from hf_spot.run.journal import BY_HAND, ENDINGS, Entry

PARTS = ("training", "redoing", "saving", "restoring", "starting", "ending", "other")
PART_MEANS = {
    "training": "steps done for the first time, and evaluations",
    "redoing": "steps that had been done before, and were lost",
    "saving": "training stood still for a save",
    "restoring": "the checkpoint was fetched and checked",
    "starting": "from the claim to the first step, without the restore",
    "ending": "from a notice to the last word, after the last step and save",
    "other": "the end of the last upload, and what nobody measured",
    "waiting": "no machine had the run",
}
FREE_FIRST_HOUR = "https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/billing-for-interrupted-spot-instances.html"
_INNER = ("process", "stage", "marks", "heard", "going")
_WORDS = ("commit", "notice", *ENDINGS)


@dataclass(frozen=True)
class Timing:
    """What a training has measured since its launch began; `hf_spot.training` writes it into commits and endings.

    Args:
        restore_s: fetching what is resumed from.
        first_step_s: from the claim to the begin of the first step; 0 before it.
        steps_s: in training steps, and the evaluations between them.
        stalled_s: training stood still for saves.
        steps: done in this launch.
        step: reached.
    """

    restore_s: float = 0.0
    first_step_s: float = 0.0
    steps_s: float = 0.0
    stalled_s: float = 0.0
    steps: int = 0
    step: int = 0

    @property
    def elapsed_s(self) -> float:
        """From the claim to here, as far as it was measured."""
        return self.first_step_s + self.steps_s + self.stalled_s

    @classmethod
    def of(cls, data: dict[str, Any]) -> Timing | None:
        """What an entry tells; None for those of an hf_spot that did not measure, and for what makes no sense."""
        told = data.get("timing")
        if not isinstance(told, dict):
            return None
        values = {name: told.get(name) or 0 for name in cls.__dataclass_fields__}
        if not all(isinstance(one, (int, float)) and math.isfinite(one) and one >= 0 for one in values.values()):
            return None
        return cls(**{**values, "steps": int(values["steps"]), "step": int(values["step"])})


@dataclass(frozen=True)
class Mark:
    """What was known at one time of a launch.

    Args:
        time: of the entry.
        stage: which of the script's trainings.
        step: reached.
        timing: what was measured; None when nothing was.
    """

    time: datetime
    stage: int
    step: int
    timing: Timing | None = None


@dataclass
class Launch:
    """One claim of the run and what came of it.

    Args:
        number: of the launch.
        began: when it claimed the run; when the same process had launched before, the end of that launch, because it held
            the machine in between.
        hostname: the machine's name, where it was recorded.
        machine: what the claim told of the machine and its price (see `hf_spot.run.machine_info`).
        machines: how many train together; the price of the first is taken for all.
        resumed_step: the step from which it trained.
        committed_step: the newest committed step of it and those before.
        reached_step: the last step that is known to be done.
        commits: how many checkpoints it committed.
        notices: how many preemption notices it heard.
        ended: ``preempted``, ``finished``, ``failed``, or ``no word`` when nothing more was heard of it.
        last_heard: time of its last entry.
        notice_to_commit_s: seconds from its first notice to the commit made because of it; None without one.
        steps_lost: steps trained and not committed when it ended; None when nobody could tell (``no word``).
        steps_redone: of its steps, those that a launch before had done.
        waited_s: without a machine, before it.
        wall_s: from ``began`` to ``last_heard``.
        parts: seconds for each of `PARTS`; they add up to ``wall_s``.
        measured: it told where its time went; else all of it is in ``other``.
        cost_usd: ``wall_s`` at its price; None when that is not known.
    """

    number: int
    began: datetime
    hostname: str | None
    machine: dict[str, Any]
    machines: int
    resumed_step: int
    committed_step: int
    last_heard: datetime
    reached_step: int = 0
    commits: int = 0
    notices: int = 0
    ended: str = "no word"
    notice_to_commit_s: float | None = None
    steps_lost: int | None = None
    steps_redone: int = 0
    waited_s: float = 0.0
    wall_s: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    measured: bool = False
    cost_usd: float | None = None
    process: tuple[Any, ...] = field(default=(), repr=False)
    stage: int = field(default=1, repr=False)
    marks: list[Mark] = field(default_factory=list, repr=False)
    heard: datetime | None = field(default=None, repr=False)
    going: datetime | None = field(default=None, repr=False)

    @property
    def price_usd_per_hour(self) -> float | None:
        """What an hour of one of its machines costs."""
        paid = dollars(self.machine, "price")
        return dollars(self.machine, "on_demand") if paid is None and self.machine.get("market") == "on-demand" else paid

    @property
    def on_demand_usd_per_hour(self) -> float | None:
        """What it would have cost on demand."""
        return dollars(self.machine, "on_demand")

    @property
    def name(self) -> str:
        """Of the machine."""
        return str(self.machine.get("instance_id") or self.hostname or "a machine")

    def to_dict(self) -> dict[str, Any]:
        """JSON values; times as ISO 8601."""
        shown = {name: value for name, value in vars(self).items() if name not in _INNER}
        for name in ("began", "last_heard"):
            shown[name] = shown[name].isoformat()
        return shown


@dataclass(frozen=True)
class Report:
    """A run's launches and their sums.

    Args:
        launches: oldest first.
        finished: the newest launch ended with ``finished``.
        committed_step: newest committed step.
        interruptions: launches that ended before the run did, however they ended.
        steps_lost: sum over the launches that could tell.
        steps_redone: sum over the launches.
        wall_s: from the first claim to the last word: ``held_s`` and ``waiting_s``.
        held_s: a launch had the run: the sum of ``parts``.
        waiting_s: nobody had it.
        parts: seconds for each of `PARTS`.
        unmeasured_s: of ``held_s``, launches that did not tell where their time went.
        goodput: share of the wall time that went to steps done for the first time; None when nobody measured.
        cost_usd: dollars for machines whose price is known, from the claim to the last word.
        unpriced_s: machine time without a known price.
        maybe_free_usd: of ``cost_usd``, what EC2 may not have charged: spot instances that heard EC2's notice in their first
            hour. It is not taken off: an instance that ends before EC2 ends it is charged, and the journal can't tell.
        on_demand_s: machine time that the same steps and saves would have taken without an interruption: one start, one last
            upload, no restore, nothing twice.
        on_demand_usd: what that would have cost on demand, where that price is known.
        on_demand_unpriced_s: of ``on_demand_s``, without a known price.
        saved_usd: the difference; None unless all prices are known.
        clock_skew_s: how far the clock of one machine was behind that of the one before, at most; the later entry is taken to
            be no earlier.
    """

    launches: tuple[Launch, ...] = ()
    finished: bool = False
    committed_step: int = 0
    interruptions: int = 0
    steps_lost: int = 0
    steps_redone: int = 0
    wall_s: float = 0.0
    held_s: float = 0.0
    waiting_s: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    unmeasured_s: float = 0.0
    goodput: float | None = None
    cost_usd: float = 0.0
    unpriced_s: float = 0.0
    maybe_free_usd: float = 0.0
    on_demand_s: float = 0.0
    on_demand_usd: float = 0.0
    on_demand_unpriced_s: float = 0.0
    saved_usd: float | None = None
    clock_skew_s: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON values; times as ISO 8601."""
        return {**vars(self), "launches": [launch.to_dict() for launch in self.launches]}


def summarise(entries: Iterable[Entry]) -> Report:
    """Folds a journal into a report. Pure.

    Args:
        entries: oldest first.
    """
    launches: list[Launch] = []
    now: datetime | None = None
    step, skew_s = 0, 0.0
    for entry in entries:
        if now is not None and entry.time < now:
            skew_s = max(skew_s, (now - entry.time).total_seconds())
        now = entry.time if now is None else max(now, entry.time)
        if entry.kind == "claim":
            if entry.data.get("by") != BY_HAND:
                launches.append(_claimed(entry, now, step, launches[-1] if launches else None))
            continue
        if entry.kind == "commit":
            newest = entry.state.latest()
            step = newest.step if newest else 0
        # Others write beside a launch too, perhaps long after it: that is no word of it. And somebody may have cut the
        # journal's beginning off.
        if launches and launches[-1].ended == "no word" and entry.kind in _WORDS and entry.data.get("reason") != "push":
            _heard(launches[-1], entry, now, step)
    return _add_up(launches, step, skew_s)


def _claimed(entry: Entry, now: datetime, step: int, before: Launch | None) -> Launch:
    data = entry.data
    told = data.get("machine")
    machine: dict[str, Any] = told if isinstance(told, dict) else {}
    process = (data.get("hostname"), data.get("pid"), machine.get("instance_id"))
    # A launcher that starts a training again, or a script that trains twice, keeps its machine; after a preemption it ends.
    stayed = before is not None and before.process == process and None not in process[:2] and before.ended != "preempted"
    began = before.last_heard if before and stayed and before.ended != "no word" else now
    machines = data.get("machines")
    return Launch(
        number=entry.launch,
        began=began,
        hostname=data.get("hostname"),
        machine=machine,
        machines=machines if isinstance(machines, int) and machines > 0 else 1,
        resumed_step=step,
        committed_step=step,
        reached_step=step,
        last_heard=now,
        waited_s=0.0 if before is None else (began - before.last_heard).total_seconds(),
        process=process,
        stage=data.get("stage", 1),
        marks=[Mark(now, data.get("stage", 1), step)],
    )


def _heard(launch: Launch, entry: Entry, now: datetime, step: int) -> None:
    launch.last_heard = now
    data = entry.data
    if entry.kind == "notice":
        launch.notices += 1
        kind = data.get("kind", NoticeKind.TERMINATE.value)
        launch.heard = launch.heard or now
        if kind != NoticeKind.ADVISORY.value:
            launch.going = None if kind == NoticeKind.CANCELLED.value else launch.going or now
        return
    launch.stage = data.get("stage", launch.stage)
    reached = data.get("step")
    if entry.kind == "commit":
        launch.commits += 1
        launch.committed_step = step
        if launch.heard and data.get("reason") in ("notice", "advisory") and launch.notice_to_commit_s is None:
            launch.notice_to_commit_s = round((now - launch.heard).total_seconds(), 3)
    elif entry.kind in ENDINGS:
        launch.ended = entry.kind
        lost = None if reached is None else max(0, reached - launch.committed_step)
        launch.steps_lost = 0 if entry.kind == "finished" else lost
    if isinstance(reached, int):
        launch.marks.append(Mark(now, launch.stage, reached, Timing.of(data)))


# -- where the time went ----------------------------------------------------------------------------------------------


def _add_up(launches: list[Launch], step: int, skew_s: float) -> Report:
    highest: dict[int, int] = {}
    for launch in launches:
        _split(launch, highest)
    parts = {name: sum(launch.parts[name] for launch in launches) for name in PARTS}
    held_s = sum(launch.wall_s for launch in launches)
    waiting_s = sum(launch.waited_s for launch in launches)
    priced = [launch for launch in launches if launch.cost_usd is not None]
    uninterrupted = _uninterrupted(launches)
    on_demand = [(machine_s, usd) for machine_s, usd in uninterrupted if usd is not None]
    unpriced_s = sum(launch.wall_s * launch.machines for launch in launches if launch.cost_usd is None)
    on_demand_s = sum(machine_s for machine_s, _ in uninterrupted)
    on_demand_unpriced_s = sum(machine_s for machine_s, usd in uninterrupted if usd is None)
    cost_usd = sum(launch.cost_usd or 0.0 for launch in priced)
    on_demand_usd = sum(machine_s / 3600 * usd for machine_s, usd in on_demand)
    measured = any(launch.measured for launch in launches)
    comparable = on_demand_s > 0 and not unpriced_s and not on_demand_unpriced_s
    return Report(
        launches=tuple(launches),
        finished=bool(launches) and launches[-1].ended == "finished",
        committed_step=step,
        interruptions=sum(launch.ended != "finished" for launch in launches[:-1])
        + sum(launch.ended in ("preempted", "failed") for launch in launches[-1:]),
        steps_lost=sum(launch.steps_lost or 0 for launch in launches),
        steps_redone=sum(launch.steps_redone for launch in launches),
        wall_s=held_s + waiting_s,
        held_s=held_s,
        waiting_s=waiting_s,
        parts=parts,
        unmeasured_s=sum(launch.wall_s for launch in launches if not launch.measured),
        goodput=parts["training"] / (held_s + waiting_s) if measured and held_s else None,
        cost_usd=cost_usd,
        unpriced_s=unpriced_s,
        maybe_free_usd=sum(launch.cost_usd or 0.0 for launch in priced if _may_be_free(launch)),
        on_demand_s=on_demand_s,
        on_demand_usd=on_demand_usd,
        on_demand_unpriced_s=on_demand_unpriced_s,
        saved_usd=on_demand_usd - cost_usd if comparable else None,
        clock_skew_s=skew_s,
    )


def _split(launch: Launch, highest: dict[int, int]) -> None:
    """Fills in what follows from a launch's marks.

    Args:
        launch: that all was heard of.
        highest: step reached by the launches before, by stage; updated.
    """
    launch.wall_s = (launch.last_heard - launch.began).total_seconds()
    price = launch.price_usd_per_hour
    launch.cost_usd = None if price is None else launch.wall_s / 3600 * price * launch.machines
    measured = list(newest_timings(launch).items())
    launch.measured = bool(measured)
    launch.reached_step = max((mark.step for mark in launch.marks if mark.stage == launch.stage), default=0)
    if measured:
        stage, timing = measured[-1]
        if stage == launch.stage:
            launch.resumed_step = max(0, timing.step - timing.steps)
            launch.reached_step = max(launch.reached_step, timing.step)
    before = highest.get(launch.stage, 0)
    trained = launch.reached_step - launch.resumed_step
    launch.steps_redone = max(0, min(launch.reached_step, before) - launch.resumed_step) if trained > 0 else 0
    highest[launch.stage] = max(before, launch.reached_step)
    if not measured:
        launch.parts["other"] = launch.wall_s
        return
    restoring_s = steps_s = stalled_s = began_s = 0.0
    starting_s = (launch.marks[0].time - launch.began).total_seconds()  # since the launch before, of the same process
    for _, timing in measured:
        restoring_s += timing.restore_s
        starting_s += max(0.0, timing.first_step_s - timing.restore_s - began_s)
        steps_s += timing.steps_s
        stalled_s += timing.stalled_s
        began_s = timing.elapsed_s
    told_s = restoring_s + starting_s + steps_s + stalled_s
    scale = launch.wall_s / told_s if told_s > launch.wall_s else 1.0  # a clock that was set in between
    rest_s = max(0.0, launch.wall_s - told_s)
    if not any(timing.steps for _, timing in measured):
        starting_s, rest_s = starting_s + rest_s, 0.0
    # The launcher knows how far a training came that crashed, and not how long it took.
    further = launch.reached_step - timing.step if stage == launch.stage else 0
    guessed_s = min(rest_s, further * timing.steps_s / timing.steps) if timing.steps else 0.0
    rest_s -= guessed_s
    since_notice_s = (launch.last_heard - launch.going).total_seconds() if launch.going else 0.0
    ending_s = min(rest_s, since_notice_s)
    own_s = timing.steps_s * scale + guessed_s  # of the last stage: those before it were finished, and are not done again
    redoing_s = own_s * launch.steps_redone / trained if trained > 0 and stage == launch.stage else 0.0
    launch.parts = {
        "training": steps_s * scale + guessed_s - redoing_s,
        "redoing": redoing_s,
        "saving": stalled_s * scale,
        "restoring": restoring_s * scale,
        "starting": starting_s * scale,
        "ending": ending_s,
        "other": rest_s - ending_s,
    }


def newest_timings(launch: Launch) -> dict[int, Timing]:
    """What each stage had measured by its last step. An ending repeats it with the time that the last upload took."""
    found: dict[int, Timing] = {}
    for mark in launch.marks:
        if mark.timing is not None and (mark.stage not in found or mark.timing.step > found[mark.stage].step):
            found[mark.stage] = mark.timing
    return found


# -- what it cost -----------------------------------------------------------------------------------------------------


def dollars(machine: dict[str, Any], which: str) -> float | None:
    """Dollars per hour under ``<name>_usd_per_hour``; None where nobody has said them."""
    told = machine.get(f"{which}_usd_per_hour")
    if not isinstance(told, (int, float)) or isinstance(told, bool) or not 0 <= told < math.inf:
        return None
    return float(told)


def _may_be_free(launch: Launch) -> bool:
    spot_of_ec2 = launch.machine.get("cloud") == "aws" and launch.machine.get("market") == "spot"
    return spot_of_ec2 and launch.notices > 0 and launch.ended in ("preempted", "no word") and launch.wall_s < 3600


def _uninterrupted(launches: list[Launch]) -> list[tuple[float, float | None]]:
    """Machine seconds that each launch's work takes without an interruption, and dollars for an hour of it on demand."""
    found = []
    started = False
    for launch in launches:
        parts = launch.parts
        if not launch.measured or not parts["training"] + parts["redoing"]:
            continue
        work_s = parts["training"] + parts["saving"] + (0.0 if started else parts["starting"])
        work_s += parts["other"] if launch.ended == "finished" else 0.0  # its last upload
        started = True
        found.append((work_s * launch.machines, launch.on_demand_usd_per_hour))
    return found
