"""What is known of a launch that was killed without a word: how far it had come, by whom it is told, and when.

The file of its steps (`hf_spot.run.told_steps`) says it to a fraction of a second, if it is on this machine. The store has it
as of the last heartbeat, at most a minute before. A later launch writes what it finds into the journal (`KIND`), because it
deletes the heartbeat.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import psutil

from hf_spot.errors import SpotError
from hf_spot.run.journal import BY_HAND, TRAINING_KEY, Entry
from hf_spot.run.mailbox import Mailbox
from hf_spot.run.run import Run
from hf_spot.run.told_steps import Told, path_of, read

log = logging.getLogger("hf_spot")

KIND = "lost"
_FROM_MEMORY = "from_memory"
BY_FILE, BY_HEARTBEAT = "steps file", "heartbeat"
_SILENT = timedelta(minutes=3)  # three heartbeats


@dataclass(frozen=True)
class LastWords:
    """How far a launch had come.

    Args:
        launch: its number.
        training: number of the training.
        step: the last step that it is known to have done.
        time: when that was told.
        known_by: ``steps file``, exact, or ``heartbeat``.
        timing: what the training had measured until then or earlier; empty if unknown.
        is_over: whether the launch is known to be dead, or has been silent for three heartbeats.
        resumed_step: the step from which the next launch resumed; 0 if unknown. It may be newer than the newest commit.
        from_memory: whether that was in the memory of its machine.
    """

    launch: int
    training: int
    step: int
    time: datetime
    known_by: str
    timing: dict[str, Any] = field(default_factory=dict)
    is_over: bool = True
    resumed_step: int = 0
    from_memory: bool = False

    def to_data(self) -> dict[str, Any]:
        """Return the fields as JSON values, for the journal."""
        return {
            "launch": self.launch,
            TRAINING_KEY: self.training,
            "step": self.step,
            "at": self.time.isoformat(),
            "known_by": self.known_by,
            "timing": self.timing,
            "resumed_step": self.resumed_step,
            **({_FROM_MEMORY: True} if self.from_memory else {}),
        }

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> LastWords | None:
        """Return what `to_data` wrote; None if these are other values."""
        try:
            launch, training, step, known_by = (data[name] for name in ("launch", TRAINING_KEY, "step", "known_by"))
            resumed_step = data.get("resumed_step", 0)
            time = datetime.fromisoformat(data["at"])
            if time.tzinfo is None or not all(type(one) is int and one >= 0 for one in (launch, training, step, resumed_step)):
                return None
            words = cls(launch, training, step, time, str(known_by), dict(data["timing"]), resumed_step=resumed_step)
            return replace(words, from_memory=data.get(_FROM_MEMORY) is True)
        except (KeyError, TypeError, ValueError):
            return None


def is_repository(url: str) -> bool:
    """Return whether each write to a run is a commit of a repository on the Hub: such a store takes no heartbeats."""
    return url.startswith("hf://") and not url.startswith("hf://buckets/")


def of_an_earlier_launch(
    told: Told, launch: int, training: int, resumed_step: int, file: Path | None, *, from_memory: bool = False
) -> LastWords | None:
    """Return how far the newest launch before ``launch`` had come, if not less far than ``resumed_step``; otherwise None.

    Args:
        told: what earlier launches have told.
        launch: number of this launch.
        training: number of the training.
        resumed_step: the step from which this launch resumes; 0 for the start.
        file: the file on this disk that says so; None if the store does.
        from_memory: whether this launch resumes from the memory of the machine.
    """
    before = max((one.launch for one in told.steps if one.launch < launch), default=0)
    if not before or told.reached_by(before) < resumed_step:
        return None
    words = _words(told, before, training, file)
    return None if words is None else replace(words, resumed_step=resumed_step, from_memory=from_memory)


def of_the_newest_launch(run: Run, entries: Sequence[Entry], now: datetime | None = None) -> LastWords | None:
    """Return how far the newest launch has come, if the journal has no end of it; None if nothing is known.

    It takes two requests. On its own machine the number of its process shows whether the launch is alive; elsewhere it counts
    as dead after three heartbeats.

    Args:
        run: to read from.
        entries: of its journal, oldest first.
        now: the time; the clock's if None.
    """
    launch = entries[-1].launch if entries else 0
    claim = next((one for one in reversed(entries) if one.kind == "claim" and one.launch == launch), None)
    if claim is None or claim.data.get("by") == BY_HAND or entries[-1].state.ended is not None:
        return None
    try:
        found = Mailbox(run).heartbeat(launch)
    except SpotError as error:
        log.warning("the heartbeat of launch %d can't be read: %s", launch, error)
        return None
    if found is None:
        return None
    training, beat = found
    words = LastWords(launch, training, beat.step, beat.time, BY_HEARTBEAT, beat.timing)
    is_here = claim.data.get("hostname") == platform.node()
    if is_here:
        path = path_of(Path(beat.output_dir), run.url, training, 0)
        by_file = _words(read(path), launch, training, path)
        words = by_file if by_file is not None and by_file.step >= words.step else words
    is_silent = (now or datetime.now(timezone.utc)) - words.time > _SILENT
    is_gone = is_here and not _is_running(claim.data.get("pid"), claim.time)
    return words if is_silent or is_gone else replace(words, is_over=False)


def _words(told: Told, launch: int, training: int, file: Path | None) -> LastWords | None:
    beat = told.heartbeat if told.heartbeat is not None and told.heartbeat.launch == launch else None
    timing = beat.timing if beat is not None else {}
    if file is not None:
        try:
            time = datetime.fromtimestamp(file.stat().st_mtime, timezone.utc)
        except OSError:
            return None
        return LastWords(launch, training, told.reached_by(launch), time, BY_FILE, timing) if told.steps else None
    return None if beat is None else LastWords(launch, training, beat.step, beat.time, BY_HEARTBEAT, timing)


def _is_running(pid: Any, since: datetime) -> bool:
    """Return whether the process that has claimed a run at a time is there; another one may have its number today."""
    try:
        return psutil.Process(pid).create_time() <= since.timestamp() + 1.0
    except (psutil.Error, TypeError, ValueError):
        return False
