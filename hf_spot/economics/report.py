"""What happened to a run, where its time went and what it cost, computed from its journal alone.

Every second between the first claim and the last entry belongs to exactly one part of one launch, or to the wait between two
launches: the parts add up to the wall time. Time counts once, for the machine that wrote the journal; its cost counts for
every machine that trained.
"""

from __future__ import annotations

import math
import posixpath
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from hf_spot.economics.bill import Bill
from hf_spot.notices.notice import NoticeKind
from hf_spot.policy.redone import Redone, in_words
from hf_spot.policy.requests import heartbeats_in, writes_of_entry
from hf_spot.run.journal import BY_HAND, ENDINGS, TRAINING_KEY, Entry
from hf_spot.run.last_words import KIND as LOST
from hf_spot.run.last_words import LastWords
from hf_spot.run.machine_info import BY_LAUNCHER
from hf_spot.run.traffic import Rate, Traffic, rates_in, traffic_data, zones_in

PARTS = ("training", "redoing", "saving", "restoring", "starting", "idle", "ending", "other")
PART_MEANS = {
    "training": "steps done for the first time, and evaluations",
    "redoing": "steps done again after they were lost",
    "saving": "training paused for a save",
    "restoring": "fetching and verifying the checkpoint",
    "starting": "from the claim to the first step, without the restore",
    "idle": "between two trainings of one process, such as two cells of a notebook",
    "ending": "from a notice to the last entry, after the last step and save",
    "other": "the end of the last upload, and unmeasured time",
    "waiting": "no machine was running the training",
}
FREE_FIRST_HOUR = "https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/billing-for-interrupted-spot-instances.html"
_INNER = ("process", "training", "marks", "resumed", "committed", "idle_s", "first_notice", "terminated_since")
_WORDS = ("resumed", "redone", "commit", "notice", "hang", *ENDINGS)


@dataclass(frozen=True)
class Timing:
    """The measurements of a training since its launch began; `hf_spot.training` writes them into commits and endings.

    Args:
        restore_s: seconds for fetching the checkpoint.
        first_step_s: seconds from the claim to the start of the first step; 0 before it.
        steps_s: seconds in training steps, and the evaluations between them.
        stalled_s: seconds for which training paused for saves.
        steps: number of steps in this launch.
        step: the step that was reached.
    """

    restore_s: float = 0.0
    first_step_s: float = 0.0
    steps_s: float = 0.0
    stalled_s: float = 0.0
    steps: int = 0
    step: int = 0

    @property
    def elapsed_s(self) -> float:
        """Return the measured seconds since the claim."""
        return self.first_step_s + self.steps_s + self.stalled_s

    @classmethod
    def of(cls, data: dict[str, Any]) -> Timing | None:
        """Return the measurements in an entry; None if there are none, as in older runs, or if they are invalid."""
        fields = data.get("timing")
        if not isinstance(fields, dict):
            return None
        values = {name: fields.get(name) or 0 for name in cls.__dataclass_fields__}
        if not all(isinstance(one, (int, float)) and math.isfinite(one) and one >= 0 for one in values.values()):
            return None
        return cls(**{**values, "steps": int(values["steps"]), "step": int(values["step"])})


@dataclass(frozen=True)
class Mark:
    """The state of a launch at one of its entries.

    Args:
        time: time of the entry.
        training: number of the script's training.
        step: the step that was reached.
        timing: the measurements; None if there are none.
    """

    time: datetime
    training: int
    step: int
    timing: Timing | None = None


@dataclass
class Launch:
    """One launch of the run.

    Args:
        number: number of the launch.
        began: when it claimed the run; if the same process ran the previous launch, the end of that one, because it held the
            machine in between.
        hostname: name of the machine, if recorded.
        machine: the machine and its price, as recorded in the claim (see `hf_spot.run.machine_info`).
        machines: number of machines that train together.
        others: those besides the first, as the claim records them (``name``, ``machine``); empty if it does not, and then the
            price of the first is used for all.
        resumed_step: the step from which it resumed.
        committed_step: the newest committed step of this and previous launches.
        reached_step: the last step that is known to be done.
        commits: number of checkpoints that it committed.
        notices: number of preemption notices that it detected.
        verified: parts of the resumed training that were compared with what was saved, and are the same.
        hung: the step after which its training hung; None if it did not.
        redone: by training, how the steps that it did again compare with what earlier launches told about them.
        ended: ``preempted``, ``finished``, ``failed``, or ``no word`` if the journal has no end of it.
        last_heard: time of its last entry.
        notice_to_commit_s: seconds from its first notice to the resulting commit; None without one.
        steps_lost: steps trained but not committed when it ended; None if unknown.
        whole_step: the step of a checkpoint that it had not committed, and that the next launch took from there; 0 for none.
        whole_in_memory: whether that was in its machine's memory, and not only on its disk.
        known_by: how that is known of a launch without a recorded end: ``steps file`` of its machine, exact, or ``heartbeat``,
            at most a minute before; None if the journal has its end, or nothing is known.
        steps_redone: number of its steps that a previous launch had already done.
        waited_s: seconds without a machine before this launch.
        wall_s: seconds from ``began`` to ``last_heard``.
        parts: seconds for each of `PARTS`; they add up to ``wall_s``.
        measured: whether it recorded where its time went; otherwise all of it is in ``other``.
        cost_usd: cost of ``wall_s``; None if the price is unknown.
    """

    number: int
    began: datetime
    hostname: str | None
    machine: dict[str, Any]
    machines: int
    others: list[dict[str, Any]]
    resumed_step: int
    committed_step: int
    last_heard: datetime
    reached_step: int = 0
    commits: int = 0
    notices: int = 0
    verified: list[str] = field(default_factory=list)
    redone: dict[int, Redone] = field(default_factory=dict)
    hung: int | None = None
    ended: str = "no word"
    notice_to_commit_s: float | None = None
    steps_lost: int | None = None
    known_by: str | None = None
    whole_step: int = 0
    whole_in_memory: bool = False
    steps_redone: int = 0
    waited_s: float = 0.0
    wall_s: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    measured: bool = False
    cost_usd: float | None = None
    process: tuple[Any, ...] = field(default=(), repr=False)
    training: int = field(default=1, repr=False)
    marks: list[Mark] = field(default_factory=list, repr=False)
    resumed: dict[int, int] = field(default_factory=dict, repr=False)  # by training, the newest commit at its claim
    committed: dict[int, int] = field(default_factory=dict, repr=False)  # by training, its newest commit
    idle_s: float = field(default=0.0, repr=False)
    first_notice: datetime | None = field(default=None, repr=False)
    terminated_since: datetime | None = field(default=None, repr=False)

    @property
    def price_usd_per_hour(self) -> float | None:
        """Return the price of one of its machines in dollars per hour."""
        return price_of(self.machine)

    @property
    def on_demand_usd_per_hour(self) -> float | None:
        """Return the on-demand price of one of its machines in dollars per hour."""
        return dollars(self.machine, "on_demand")

    @property
    def name(self) -> str:
        """Return the name of the machine."""
        return str(self.machine.get("instance_id") or self.hostname or "a machine")

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; times as ISO 8601."""
        shown = {name: value for name, value in vars(self).items() if name not in _INNER}
        for name in ("began", "last_heard"):
            shown[name] = shown[name].isoformat()
        shown["redone"] = [
            {"training": training, **one.to_data(), "in_words": in_words(one)} for training, one in self.redone.items()
        ]
        return shown


@dataclass(frozen=True)
class TrackerPlace:
    """Where a tracker shows a training.

    Args:
        training: number of the training, from 1.
        name: the tracker, as in ``report_to``.
        id: of the tracker run; empty for none.
        place: URL, or folder or file on the machine that wrote it; empty if only the id is known.
    """

    training: int
    name: str
    id: str
    place: str


@dataclass(frozen=True)
class Report:
    """A run's launches and their totals.

    Args:
        launches: oldest first.
        trackers: where trackers show the trainings.
        finished: the newest launch ended with ``finished``.
        committed_step: newest committed step.
        interruptions: number of launches that ended before the run did, in whatever way.
        steps_lost: total over the launches where it is known.
        steps_redone: total over the launches.
        wall_s: seconds from the first claim to the last entry: ``held_s`` and ``waiting_s``.
        held_s: seconds during which a launch had the run: the sum of ``parts``.
        waiting_s: seconds between launches.
        parts: seconds for each of `PARTS`.
        unmeasured_s: part of ``held_s`` in launches that did not record where their time went.
        goodput: share of the wall time spent on steps done for the first time; None if nothing was measured.
        cost_usd: dollars for machines with a known price, from the claim to the last entry.
        unpriced_s: machine seconds without a known price.
        maybe_free_usd: part of ``cost_usd`` that EC2 may not have charged: spot instances that got EC2's notice in their first
            hour. It is not subtracted: an instance that shuts down before EC2 ends it is charged, and the journal does not
            show which happened.
        on_demand_s: machine seconds that the same steps and saves would have taken without an interruption: one start, one
            last upload, no restore, nothing twice.
        on_demand_usd: on-demand cost of that time, where the price is known.
        on_demand_unpriced_s: part of ``on_demand_s`` without a known price.
        saved_usd: the difference; None unless all prices are known.
        bill: of the machines of `hf-spot provision`.
        traffic: what the machines have exchanged with the store.
        store_place: region of the store, or ``internet``, as `hf-spot provision` has found it; empty if unknown.
        traffic_rates: prices of that traffic.
        writes: about how many writes were made to the store: files of checkpoints, entries, heartbeats.
        clock_skew_s: the most by which one machine's clock was behind the previous machine's; such an entry is treated as
            simultaneous with the previous one.
    """

    launches: tuple[Launch, ...] = ()
    trackers: tuple[TrackerPlace, ...] = ()
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
    bill: Bill = field(default_factory=Bill)
    traffic: Traffic = field(default_factory=Traffic)
    store_place: str = ""
    traffic_rates: tuple[Rate, ...] = ()
    writes: int = 0
    clock_skew_s: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; times as ISO 8601."""
        launches, trackers = [launch.to_dict() for launch in self.launches], [vars(one) for one in self.trackers]
        shown = {name: value for name, value in vars(self).items() if name not in ("store_place", "traffic_rates")}
        traffic = traffic_data(self.traffic, self.store_place, self.traffic_rates)
        return {**shown, "launches": launches, "trackers": trackers, "traffic": traffic, "bill": self.bill.to_data()}


def _sizes_bytes(files: object) -> list[int]:
    """Return the sizes of the files of a commit; of values that are none, nothing."""
    sizes = [one.get("size") for one in files if isinstance(one, dict)] if isinstance(files, list) else []
    return [size for size in sizes if isinstance(size, int) and size >= 0]


def summarise(entries: Iterable[Entry], last_words: LastWords | None = None) -> Report:
    """Compute the report of a journal. Pure.

    Args:
        entries: entries of the journal, oldest first.
        last_words: how far the newest launch has come, if the journal has no end of it
            (`hf_spot.run.last_words.of_the_newest_launch`).
    """
    launches: list[Launch] = []
    now: datetime | None = None
    step, skew_s, writes, bill = 0, 0.0, 0, Bill()
    traffic, place, rates, zones = Traffic(), "", tuple[Rate, ...](), dict[str, int]()
    trackers: dict[tuple[int, str], TrackerPlace] = {}
    for entry in entries:
        if now is not None and entry.time < now:
            skew_s = max(skew_s, (now - entry.time).total_seconds())
        now = entry.time if now is None else max(now, entry.time)
        traffic, bill = traffic.after(entry), bill.after(entry)
        if entry.kind == "machine" and isinstance(entry.data.get("traffic"), dict):
            place, known = rates_in(entry.data["traffic"])
            rates, zones = tuple(known), zones_in(entry.data["traffic"])
        writes += writes_of_entry(_sizes_bytes(entry.data.get("files")) if entry.kind in ("commit", "weights") else ())
        if entry.kind == "claim":
            if entry.data.get("by") != BY_HAND:
                launches.append(_claimed(entry, now, step, launches[-1] if launches else None))
            continue
        if entry.kind == "resumed" and "taken_from" in entry.data:
            _add_uncommitted(launches, entry)
        if entry.kind == LOST:
            _add_last_words(launches, LastWords.of(entry.data))
        if entry.kind == "commit":
            newest = entry.state.latest()
            step = newest.step if newest else 0
            trackers |= {(one.training, one.name): one for one in _trackers_of(entry.data)}
        # Entries by other writers, perhaps long after a launch, don't belong to it. The beginning of the journal may be
        # missing.
        if launches and launches[-1].ended == "no word" and entry.kind in _WORDS and entry.data.get("reason") != "push":
            _add_entry(launches[-1], entry, now, step)
    _add_last_words(launches, last_words)
    report = _add_up(launches, step, skew_s)
    writes += heartbeats_in(report.held_s)
    traffic = replace(traffic, between_zones=zones)
    report = replace(report, bill=bill, traffic=traffic, store_place=place, traffic_rates=rates)
    return replace(report, writes=writes, trackers=tuple(trackers[key] for key in sorted(trackers)))


def _add_last_words(launches: list[Launch], words: LastWords | None) -> None:
    """Add how far a launch without an end has come, unless it is known already."""
    at = next((at for at, launch in enumerate(launches) if words is not None and launch.number == words.launch), None)
    if words is None or at is None or launches[at].ended != "no word" or launches[at].known_by is not None:
        return
    launch, after = launches[at], launches[at + 1] if at + 1 < len(launches) else None
    time = max(launch.last_heard, words.time)  # its clock, or that of its disk, may be behind
    launch.last_heard = time if after is None else min(time, after.began)
    launch.training = words.training
    launch.marks.append(Mark(launch.last_heard, words.training, words.step, Timing.of({"timing": words.timing})))
    launch.known_by = words.known_by
    launch.whole_step = words.resumed_step if words.resumed_step > launch.committed.get(words.training, 0) else 0
    launch.whole_in_memory = launch.whole_step > 0 and words.from_memory
    if words.is_over:
        launch.steps_lost = max(0, words.step - max(words.resumed_step, launch.committed.get(words.training, 0)))
    if after is not None:
        after.waited_s = (after.began - launch.last_heard).total_seconds()


def _add_uncommitted(launches: list[Launch], resumed: Entry) -> None:
    """Add that the newest launch has resumed from a checkpoint that the one before it had saved, and not committed."""
    training, step = resumed.data.get(TRAINING_KEY, 1), resumed.data.get("step")
    if len(launches) < 2 or launches[-1].number != resumed.launch or not isinstance(step, int):
        return
    before, after = launches[-2:]
    if step <= before.committed.get(training, 0):
        return
    before.whole_step, before.whole_in_memory = step, resumed.data["taken_from"] == "memory"
    after.resumed[training] = step
    if training == after.training:
        after.resumed_step = step
    if before.steps_lost is not None and training == before.training:
        reached = max((mark.step for mark in before.marks if mark.training == training), default=0)
        before.steps_lost = max(0, reached - step)


def _trackers_of(data: dict[str, Any]) -> list[TrackerPlace]:
    """Return where trackers show the training of a commit."""
    found, training = data.get("trackers"), data.get(TRAINING_KEY, 1)
    places = []
    for name, place in found.items() if isinstance(found, dict) else ():
        if isinstance(place, str):  # a folder, relative to that of the checkpoints
            folder = posixpath.normpath(posixpath.join(str(data.get("output_dir", "")), place))
            places.append(TrackerPlace(training, str(name), "", folder))
        elif isinstance(place, dict):
            places.append(TrackerPlace(training, str(name), str(place.get("id") or ""), str(place.get("url") or "")))
    return places


def _claimed(entry: Entry, now: datetime, step: int, before: Launch | None) -> Launch:
    data = entry.data
    recorded = data.get("machine")
    machine: dict[str, Any] = recorded if isinstance(recorded, dict) else {}
    process = (data.get("hostname"), data.get("pid"), machine.get("instance_id"))
    # A launcher that restarts a training, or a script with two trainings, keeps its machine; after a preemption it ends.
    stayed = before is not None and before.process == process and None not in process[:2] and before.ended != "preempted"
    began = before.last_heard if before and stayed and before.ended != "no word" else now
    committed = {ref.training: ref.step for ref in entry.state.checkpoints}  # the newest one is the last
    newest = entry.state.latest()
    training = data.get(TRAINING_KEY, newest.training if newest else 1)
    # A launcher starts its training again; in a script or a notebook something else was done in between.
    is_idle = data.get("by") not in (None, BY_LAUNCHER)
    machines = data.get("machines")
    return Launch(
        number=entry.launch,
        began=began,
        hostname=data.get("hostname"),
        machine=machine,
        machines=machines if isinstance(machines, int) and machines > 0 else 1,
        others=_others(data.get("roster")),
        resumed_step=step,
        committed_step=step,
        reached_step=step,
        last_heard=now,
        waited_s=0.0 if before is None else (began - before.last_heard).total_seconds(),
        process=process,
        training=training,
        marks=[Mark(now, training, step)],
        resumed=committed,
        committed=dict(committed),
        idle_s=(now - began).total_seconds() if is_idle else 0.0,
    )


def _add_entry(launch: Launch, entry: Entry, now: datetime, step: int) -> None:
    launch.last_heard = now
    data = entry.data
    if entry.kind == "resumed":
        launch.verified = [str(part) for part in data.get("verified", [])]
        return
    if entry.kind == "redone":
        found = Redone.of(data)
        if found is not None:
            launch.redone[data.get(TRAINING_KEY, launch.training)] = found
        return
    if entry.kind == "hang":
        launch.hung = data.get("step")
        return
    if entry.kind == "notice":
        launch.notices += 1
        kind = data.get("kind", NoticeKind.TERMINATE.value)
        launch.first_notice = launch.first_notice or now
        if kind != NoticeKind.ADVISORY.value:
            launch.terminated_since = None if kind == NoticeKind.CANCELLED.value else launch.terminated_since or now
        return
    launch.training = data.get(TRAINING_KEY, launch.training)
    reached = data.get("step")
    if entry.kind == "commit":
        launch.commits += 1
        launch.committed_step = step
        launch.committed[launch.training] = max(entry.data["step"], launch.committed.get(launch.training, 0))
        if launch.first_notice and data.get("reason") in ("notice", "advisory") and launch.notice_to_commit_s is None:
            launch.notice_to_commit_s = round((now - launch.first_notice).total_seconds(), 3)
    elif entry.kind in ENDINGS:
        launch.ended = entry.kind
        lost = None if reached is None else max(0, reached - launch.committed.get(launch.training, 0))
        launch.steps_lost = 0 if entry.kind == "finished" else lost
    if isinstance(reached, int):
        launch.marks.append(Mark(now, launch.training, reached, Timing.of(data)))


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
        + sum(
            launch.ended in ("preempted", "failed") or (launch.known_by is not None and launch.steps_lost is not None)
            for launch in launches[-1:]
        ),
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
    """Fill in the fields that are derived from a launch's marks.

    Args:
        launch: a launch with all its entries added.
        highest: step reached by previous launches, by training; updated.
    """
    launch.wall_s = (launch.last_heard - launch.began).total_seconds()
    price = price_of_all(launch)
    launch.cost_usd = None if price is None else launch.wall_s / 3600 * price
    measured = list(newest_timings(launch).items())
    launch.measured = bool(measured)
    launch.reached_step = max((mark.step for mark in launch.marks if mark.training == launch.training), default=0)
    if measured:
        training, timing = measured[-1]
        if training == launch.training:
            launch.resumed_step = max(0, timing.step - timing.steps)
            launch.reached_step = max(launch.reached_step, timing.step)
    shares: dict[int, float] = {}  # of each training's steps, those that were done again
    for training in dict.fromkeys([*launch.redone, *(mark.training for mark in launch.marks), launch.training]):
        again, trained = _redone_steps(launch, training, highest)
        launch.steps_redone += again
        shares[training] = again / trained if trained > 0 else 0.0
    if not measured:
        launch.parts["other"] = launch.wall_s
        return
    restoring_s = steps_s = stalled_s = began_s = 0.0
    # Since the previous launch of the same process, which held the machine.
    starting_s = (launch.marks[0].time - launch.began).total_seconds() - launch.idle_s
    for _, timing in measured:
        restoring_s += timing.restore_s
        starting_s += max(0.0, timing.first_step_s - timing.restore_s - began_s)
        steps_s += timing.steps_s
        stalled_s += timing.stalled_s
        began_s = timing.elapsed_s
    measured_s = restoring_s + starting_s + steps_s + stalled_s + launch.idle_s
    scale = launch.wall_s / measured_s if measured_s > launch.wall_s else 1.0  # the clock was changed in between
    rest_s = max(0.0, launch.wall_s - measured_s)
    if not any(timing.steps for _, timing in measured):
        starting_s, rest_s = starting_s + rest_s, 0.0
    # For a crashed training the launcher knows its last step, but not the time of the last steps.
    further = launch.reached_step - timing.step if training == launch.training else 0
    estimated_s = min(rest_s, further * timing.steps_s / timing.steps) if timing.steps else 0.0
    rest_s -= estimated_s
    since_notice_s = (launch.last_heard - launch.terminated_since).total_seconds() if launch.terminated_since else 0.0
    ending_s = min(rest_s, since_notice_s)
    redoing_s = sum(one.steps_s * scale * shares.get(number, 0.0) for number, one in measured)
    redoing_s += estimated_s * shares.get(launch.training, 0.0)
    launch.parts = {
        "training": max(0.0, steps_s * scale + estimated_s - redoing_s),  # x * 3 / 3 may be more than x
        "redoing": redoing_s,
        "saving": stalled_s * scale,
        "restoring": restoring_s * scale,
        "starting": starting_s * scale,
        "idle": launch.idle_s * scale,
        "ending": ending_s,
        "other": rest_s - ending_s,
    }


def _redone_steps(launch: Launch, training: int, highest: dict[int, int]) -> tuple[int, int]:
    """Return how many steps of a training a launch has done again, and how many it has done; update ``highest``."""
    is_last = training == launch.training
    reached = max((mark.step for mark in launch.marks[1:] if mark.training == training), default=0)
    resumed = launch.resumed_step if is_last else launch.resumed.get(training, 0)
    timing = newest_timings(launch).get(training)
    if timing is not None:
        resumed, reached = max(0, timing.step - timing.steps), max(reached, timing.step)
    # A launch that was killed may have told its last steps to nobody but the next one.
    before = highest.get(training, 0)
    if (told := launch.redone.get(training)) is not None:
        before, reached = max(before, told.last), max(reached, told.first - 1 + told.steps)
    if is_last:
        launch.reached_step = reached = max(reached, launch.reached_step)
    highest[training] = max(before, reached)
    return (max(0, min(reached, before) - resumed) if reached > resumed else 0), reached - resumed


def newest_timings(launch: Launch) -> dict[int, Timing]:
    """Return the measurements of each training up to its last step, without the last upload that its end may include."""
    found: dict[int, Timing] = {}
    for mark in launch.marks:
        if mark.timing is not None and (mark.training not in found or mark.timing.step > found[mark.training].step):
            found[mark.training] = mark.timing
    return found


# -- what it cost -----------------------------------------------------------------------------------------------------


def dollars(machine: dict[str, Any], which: str) -> float | None:
    """Return the dollars per hour under ``<which>_usd_per_hour``; None if unknown or invalid."""
    usd = machine.get(f"{which}_usd_per_hour")
    if not isinstance(usd, (int, float)) or isinstance(usd, bool) or not 0 <= usd < math.inf:
        return None
    return float(usd)


def price_of(machine: dict[str, Any]) -> float | None:
    """Return the price of a machine in dollars per hour, as a claim records it; None if unknown."""
    price = dollars(machine, "price")
    return dollars(machine, "on_demand") if price is None and machine.get("market") == "on-demand" else price


def price_of_all(launch: Launch) -> float | None:
    """Return the price of all machines of a launch in dollars per hour; None if that of one is unknown."""
    prices = [launch.price_usd_per_hour, *(price_of(one["machine"]) for one in launch.others)]
    known = [one for one in prices if one is not None]
    if len(known) < len(prices):
        return None
    return sum(known) if launch.others else known[0] * launch.machines


def _others(roster: Any) -> list[dict[str, Any]]:
    """Return the machines of a claim's roster besides the first; empty if it has none, or one that can't be read."""
    if not isinstance(roster, list) or not all(isinstance(one, dict) for one in roster):
        return []
    return [
        {"name": str(one.get("name") or "a machine"), "machine": one["machine"] if isinstance(one.get("machine"), dict) else {}}
        for one in roster[1:]
    ]


def name_of(other: dict[str, Any]) -> str:
    """Return the name of a machine of ``Launch.others``."""
    return str(other["machine"].get("instance_id") or other["name"])


def _may_be_free(launch: Launch) -> bool:
    spot_of_ec2 = launch.machine.get("cloud") == "aws" and launch.machine.get("market") == "spot"
    return spot_of_ec2 and launch.notices > 0 and launch.ended in ("preempted", "no word") and launch.wall_s < 3600


def _uninterrupted(launches: list[Launch]) -> list[tuple[float, float | None]]:
    """Return the machine seconds of each launch's work without interruptions, and their on-demand price per hour."""
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
