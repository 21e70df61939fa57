"""What happened to a run, read from its journal alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any

from hf_spot.run.journal import ENDINGS, Entry


@dataclass(frozen=True)
class Launch:
    """One claim of the run and what came of it.

    Args:
        epoch: number of the launch.
        began: when it claimed the run.
        hostname: the machine's name, where it was recorded.
        resumed_step: the newest committed step when it began.
        committed_step: the newest committed step of it and those before.
        commits: how many checkpoints it committed.
        notices: how many preemption notices it heard.
        ended: ``preempted``, ``finished``, ``failed``, or ``no word`` when nothing more was heard of it.
        last_heard: time of its last entry.
        notice_to_commit_s: seconds from its first notice to the commit made because of it; None without one.
        steps_lost: steps trained and not committed when it ended; None when nobody could tell (``no word``).
    """

    epoch: int
    began: datetime
    hostname: str | None
    resumed_step: int
    committed_step: int
    commits: int = 0
    notices: int = 0
    ended: str = "no word"
    last_heard: datetime | None = None
    notice_to_commit_s: float | None = None
    steps_lost: int | None = None


@dataclass(frozen=True)
class Report:
    """A run's launches and their sums.

    Args:
        launches: oldest first.
        finished: the newest launch ended with ``finished``.
        committed_step: newest committed step.
        interruptions: launches that ended before the run did, however they ended.
        steps_lost: sum over the launches that could tell.
    """

    launches: tuple[Launch, ...] = field(default=())
    finished: bool = False
    committed_step: int = 0
    interruptions: int = 0
    steps_lost: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON values; times as ISO 8601."""

        def plain(value: Any) -> Any:
            return value.isoformat() if isinstance(value, datetime) else value

        fields = asdict(self)
        fields["launches"] = [{name: plain(value) for name, value in asdict(launch).items()} for launch in self.launches]
        return fields


def summarise(entries: Iterable[Entry]) -> Report:
    """Folds a journal into a report. Pure.

    Args:
        entries: oldest first.
    """
    launches: list[Launch] = []
    heard_at: datetime | None = None
    step = 0
    for entry in entries:
        if entry.kind == "claim":
            host = entry.data.get("hostname")
            launches.append(Launch(entry.epoch, entry.time, host, step, step, last_heard=entry.time))
            heard_at = None
            continue
        if entry.kind == "machine":
            continue  # said by who starts machines, and no sign that the training lives
        if not launches:
            continue  # somebody cut the journal's beginning off; what is left still tells something
        now = replace(launches[-1], last_heard=entry.time)
        if entry.kind == "notice":
            now = replace(now, notices=now.notices + 1)
            heard_at = heard_at or entry.time
        elif entry.kind == "commit":
            newest = entry.state.latest()
            step = newest.step if newest else 0
            now = replace(now, commits=now.commits + 1, committed_step=step)
            if heard_at is not None and entry.data["reason"] in ("notice", "advisory") and now.notice_to_commit_s is None:
                now = replace(now, notice_to_commit_s=round((entry.time - heard_at).total_seconds(), 3))
        elif entry.kind in ENDINGS:
            reached = entry.data.get("step")
            lost = 0 if entry.kind == "finished" else None if reached is None else max(0, reached - now.committed_step)
            now = replace(now, ended=entry.kind, steps_lost=lost)
        launches[-1] = now
    return Report(
        launches=tuple(launches),
        finished=bool(launches) and launches[-1].ended == "finished",
        committed_step=step,
        interruptions=sum(launch.ended != "finished" for launch in launches[:-1])
        + sum(launch.ended in ("preempted", "failed") for launch in launches[-1:]),
        steps_lost=sum(launch.steps_lost or 0 for launch in launches),
    )


def render(report: Report, url: str) -> str:
    """A table for people."""
    if not report.launches:
        return f"{url}: nobody has launched this run yet"
    head = f"{'launch':>6}  {'began (UTC)':19}  {'minutes':>7}  {'steps':>13}  {'commits':>7}"
    head += f"  {'notice→commit':>13}  {'lost':>5}  ended"
    lines = [f"{url}: {'finished' if report.finished else 'not finished'}, step {report.committed_step} committed", head]
    for launch in report.launches:
        minutes = ((launch.last_heard or launch.began) - launch.began).total_seconds() / 60
        answered = "" if launch.notice_to_commit_s is None else f"{launch.notice_to_commit_s:.1f} s"
        lost = "?" if launch.steps_lost is None else str(launch.steps_lost)
        steps = f"{launch.resumed_step}→{launch.committed_step}"
        lines.append(
            f"{launch.epoch:>6}  {launch.began:%Y-%m-%d %H:%M:%S}  {minutes:>7.1f}  {steps:>13}  {launch.commits:>7}"
            f"  {answered:>13}  {lost:>5}  {launch.ended}"
        )
    unknown = sum(launch.steps_lost is None and launch is not report.launches[-1] for launch in report.launches)
    lines.append(
        f"{report.interruptions} interruptions, {report.steps_lost} steps lost"
        + (f" and {unknown} launches that ended without a word" if unknown else "")
    )
    return "\n".join(lines)
