"""A run as it is now, computed from its journal: what ``hf-spot runs follow`` shows, as a picture and as lines."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hf_spot.economics.report import Report, Timing, dollars, summarise
from hf_spot.economics.timeline import losses_in
from hf_spot.errors import ObjectNotFound, SpotError
from hf_spot.notices.notice import PreemptionNotice
from hf_spot.run.journal import ENDINGS, Entry
from hf_spot.run.last_words import LastWords, of_the_newest_launch
from hf_spot.run.run import Run

_LAST = 5  # events shown
_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 48  # of the curve, in characters
_STYLES = {"finished": "green", "failed": "red", "preempted": "yellow"}


@dataclass(frozen=True)
class View:
    """A run at one moment.

    Args:
        url: of the run.
        now: the moment.
        launch: number of the newest launch.
        ended: how it ended; None if it is running, or died without a word.
        step: the newest committed step.
        likely_step: the step that it has probably reached, by its speed; None if that is unknown, or nothing is running.
        max_steps: of how many; None if unknown.
        step_s: seconds of one step; None if unknown.
        silent_since: when the newest launch was heard last, if it has no end and is dead or silent for three heartbeats.
        losses: losses of the newest checkpoint, by step.
        committed: time of the newest commit; None without one.
        next_save: the step at which the next save is due, by the distance of the newest two; None if unknown.
        machines: number of machines of the newest launch.
        machine: name of its first machine.
        cost_usd: of the whole run up to now; None if no price is known.
        notices: preemption notices that the newest launch has detected.
        events: the newest entries as lines.
    """

    url: str
    now: datetime
    launch: int
    ended: str | None
    step: int
    likely_step: int | None
    max_steps: int | None
    step_s: float | None
    silent_since: datetime | None = None
    losses: dict[int, float] = field(default_factory=dict)
    committed: datetime | None = None
    next_save: int | None = None
    machines: int = 1
    machine: str = ""
    cost_usd: float | None = None
    notices: int = 0
    events: tuple[str, ...] = ()

    @property
    def left(self) -> timedelta | None:
        """Return the time until the last step, at the speed of now; None if it is unknown, or nothing is running."""
        if self.max_steps is None or self.step_s is None or self.ended is not None or self.silent_since is not None:
            return None
        return timedelta(seconds=max(0, self.max_steps - (self.likely_step or self.step)) * self.step_s)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; times as ISO 8601."""
        told = dict(vars(self))
        times = (("now", self.now), ("committed", self.committed), ("silent_since", self.silent_since))
        told |= {name: time.isoformat() if time else None for name, time in times}
        told |= {"left_s": self.left.total_seconds() if self.left is not None else None, "events": list(self.events)}
        return told


class Follower:
    """Reads the new entries of a run's journal at each look.

    Args:
        run: the run.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._entries: list[Entry] = []
        self._losses: tuple[int, dict[int, float]] = (0, {})  # of which commit, and by step

    @property
    def number(self) -> int:
        """Return the number of the newest entry that was read."""
        return self._entries[-1].number if self._entries else 0

    def new_entries(self, after: int) -> list[Entry]:
        """Return the entries that were read after the one of a number."""
        return [entry for entry in self._entries if entry.number > after]

    def continues(self, run: Run) -> bool:
        """Return whether a run is the one that was read until now, and not another one that was begun at its place.

        Raises:
            StoreError: the store could not be read.
        """
        try:
            return not self._entries or run.journal.read(self.number).id == self._entries[-1].id
        except ObjectNotFound:
            return False

    def look(self, now: datetime) -> View:
        """Read what is new, and return the run as it is now. Raises StoreError."""
        state = self._run.state()
        if not self._entries:
            self._entries = list(self._run.events())
        self._entries += [self._run.journal.read(number) for number in range(self.number + 1, state.number + 1)]
        words = of_the_newest_launch(self._run, self._entries, now)
        return view_of(self._run.url, self._entries, now, self._losses_now(), words)

    def _losses_now(self) -> dict[int, float]:
        newest = self._run.journal.state.latest()
        if newest is not None and newest.entry != self._losses[0]:
            try:
                losses = losses_in(self._run.read(self._run.checkpoint(newest), "trainer_state.json"))
            except SpotError:  # pruned in between, or written by a custom loop, which has no such file
                losses = {}
            self._losses = newest.entry, losses
        return self._losses[1]


def view_of(url: str, entries: list[Entry], now: datetime, losses: dict[int, float], words: LastWords | None = None) -> View:
    """Return a run at a moment. Pure.

    Args:
        url: of the run.
        entries: its journal.
        now: the moment.
        losses: of its newest checkpoint, by step.
        words: how far the newest launch has come, if that is known and it has not ended.
    """
    state = entries[-1].state
    report: Report = summarise(entries, words)
    launch = report.launches[-1] if report.launches else None
    newest = state.latest()
    commits = [entry for entry in entries if entry.kind == "commit" and entry.data.get("reason") != "push"]
    commit = commits[-1] if commits else None
    timings = [found for entry in reversed(entries) if (found := Timing.of(entry.data)) is not None and found.steps > 0]
    step_s = timings[0].steps_s / timings[0].steps if timings else None
    max_steps = next((entry.data["max_steps"] for entry in reversed(commits) if entry.data.get("max_steps")), None)
    likely = None
    if state.ended is None and commit is not None and commit.launch == state.launch and step_s:
        likely = commit.data["step"] + int((now - commit.time).total_seconds() / step_s)
    if words is not None:
        likely = words.step if words.is_over or not step_s else words.step + int((now - words.time).total_seconds() / step_s)
    likely = likely if likely is None or max_steps is None else min(likely, max_steps)
    regular = [entry.data["step"] for entry in commits if entry.data.get("reason") == "schedule"]
    due = 2 * regular[-1] - regular[-2] if len(regular) > 1 and regular[-1] > regular[-2] else None
    is_silent = words is not None and words.is_over
    is_on = state.ended is None and not is_silent
    if due is not None and not (is_on and (newest.step if newest else 0) < due <= (max_steps or due)):
        due = None
    price = None if launch is None else dollars(launch.machine, "price")
    return View(
        url=url,
        now=now,
        launch=state.launch,
        ended=state.ended,
        step=newest.step if newest else 0,
        likely_step=likely,
        max_steps=max_steps,
        step_s=step_s,
        losses=losses,
        committed=commit.time if commit else None,
        silent_since=words.time if words is not None and is_silent else None,
        next_save=due
        if state.ended is None and not is_silent and (max_steps is None or due is None or due <= max_steps)
        else None,
        machines=launch.machines if launch else 1,
        machine=launch.name if launch else "",
        cost_usd=report.cost_usd if price is not None or report.cost_usd else None,
        notices=launch.notices if launch else 0,
        events=tuple(deque(lines_of(entries), _LAST)),
    )


def lines_of(entries: Iterable[Entry]) -> Iterator[str]:
    """Yield a line for each entry that people want to see. Pure."""
    for entry in entries:
        if (words := _in_words(entry)) is not None:
            yield f"{entry.time:%Y-%m-%d %H:%M:%S}  {words}"


def _in_words(entry: Entry) -> str | None:
    data = entry.data
    if entry.kind == "claim":
        return f"launch {entry.launch} begins on {data.get('hostname') or data.get('by') or 'a machine'}"
    if entry.kind == "commit":
        of = f" of {data['max_steps']}" if data.get("max_steps") else ""
        size_bytes = sum(file["size"] for file in data["files"])
        return f"step {data['step']}{of} committed ({data.get('reason')}, {size_bytes / 1e6:,.1f} MB)"
    if entry.kind == "notice":
        return f"notice: {_notice_in_words(data)}"
    if entry.kind in ENDINGS:
        code = data.get("exit_code")
        return (
            f"launch {entry.launch} has ended: {entry.kind}{f', exit code {code}' if code and entry.kind == 'failed' else ''}"
        )
    if entry.kind == "prune":
        return f"pruned: step {', '.join(map(str, data.get('steps', ())))}"
    if entry.kind == "hang":
        return f"the training hangs after step {data.get('step', '?')}: rank {data.get('rank', '?')}, {data.get('phase', '?')}"
    if entry.kind == "rollback":
        return f"{data.get('why', 'NaN')}: rolled back to step {data.get('committed_step', '?')}"
    if entry.kind == "spike":
        return f"the loss of step {data.get('step', '?')} stands out: {data.get('loss')}, usually {data.get('usual')}"
    if entry.kind == "resumed":
        return f"launch {entry.launch} resumes from step {data.get('step', '?')}"
    if entry.kind == "lost":
        return f"launch {data.get('launch', '?')} had ended without a word after step {data.get('step', '?')}"
    if entry.kind == "weights":
        return f"of step {data['step']} the weights are kept"
    return None


def _notice_in_words(data: dict[str, Any]) -> str:
    try:
        return PreemptionNotice.from_json(json.dumps(data)).in_words()
    except ValueError:  # written by a newer hf_spot
        return str(data.get("kind"))


def facts_of(view: View) -> Iterator[tuple[str, str]]:
    """Yield what is known of a run now: a name, and words. Pure."""
    running = "running, or died without a word"
    if view.silent_since is not None:
        running = f"ended without a word, or is stuck: silent for {_span(view.now - view.silent_since)}"
    yield "launch", f"{view.launch}: {view.ended or running}"
    of = f" of {view.max_steps}" if view.max_steps else ""
    likely = f", about {view.likely_step} reached" if view.likely_step is not None else ""
    yield "step", f"{view.step}{of} committed{likely}"
    if view.losses:
        last = max(view.losses)
        yield "loss", f"{view.losses[last]:.4g} at step {last}"
    if view.step_s:
        left = f", {_span(view.left)} left" if view.left is not None else ""
        yield "speed", f"{_speed(view.step_s)}{left}"
    if view.committed is not None:
        due = f"; the next save is due at step {view.next_save}" if view.next_save else ""
        yield "last commit", f"{_span(view.now - view.committed)} ago{due}"
    more = f" and {view.machines - 1} more" if view.machines > 1 else ""
    yield "machine", f"{view.machine}{more}"
    if view.cost_usd is not None:
        yield "cost", f"${view.cost_usd:,.2f}"
    if view.notices:
        yield "notices", str(view.notices)


def picture_of(view: View) -> RenderableType:
    """Return the run as a picture for a terminal. Pure."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column()
    styles = {"launch": _STYLES.get(view.ended or "", "bold"), "notices": "bold yellow"}
    for name, words in facts_of(view):
        facts.add_row(name, Text(f"{words}  {curve(view.losses)}" if name == "loss" else words, style=styles.get(name, "")))
    parts: list[RenderableType] = [facts]
    if view.max_steps:
        parts.append(ProgressBar(total=view.max_steps, completed=view.likely_step or view.step))
    parts += [Text(line, style="dim") for line in view.events]
    return Panel(Group(*parts), title=Text(view.url, style="bold"), title_align="left")


def curve(losses: dict[int, float], width: int = _WIDTH) -> str:
    """Return the losses as a line of bars, the newest last. Pure."""
    values = [value for _, value in sorted(losses.items()) if math.isfinite(value)][-width:]
    if not values:
        return ""
    low, high = min(values), max(values)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in values)


def _speed(step_s: float) -> str:
    return f"{step_s:.1f} s a step" if step_s >= 1 else f"{1 / step_s:.1f} steps a second"


def _span(time: timedelta) -> str:
    seconds = max(0, int(time.total_seconds()))
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"
