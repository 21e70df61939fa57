"""What a launch tells about its steps, in a file on the disk of its machine, so that the next launch can compare.

The file is in ``output_dir/.hf_spot``, one for each training and rank: a line of JSON for each launch, which says under which
circumstances it trains, one for each step, and a heartbeat every few seconds. It survives the death of every process. A line
that was cut short is ignored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from io import FileIO
from pathlib import Path
from typing import Any

from hf_spot.policy.redone import Step
from hf_spot.runtime import write_atomically


@dataclass(frozen=True)
class Heartbeat:
    """How far a launch had come, and when: what is known of it if it is killed.

    Args:
        launch: its number.
        step: the step that was done.
        time: when it was told, by the launch's clock.
        timing: what the training had measured (`hf_spot.economics.report.Timing`).
        output_dir: where its checkpoints and this file are, on the machine of rank 0.
    """

    launch: int
    step: int
    time: datetime
    timing: dict[str, Any]
    output_dir: str

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**asdict(self), "time": self.time.isoformat()}

    @classmethod
    def of(cls, told: Any) -> Heartbeat:
        """Return what `to_json` wrote. Raises ValueError, TypeError, KeyError."""
        launch, step, time = told["launch"], told["step"], datetime.fromisoformat(told["time"])
        if type(launch) is not int or type(step) is not int or min(launch, step) < 0 or time.tzinfo is None:
            raise TypeError(f"not a heartbeat: {told!r}")
        return cls(launch, step, time, dict(told["timing"]), str(told["output_dir"]))


@dataclass(frozen=True)
class Told:
    """What launches have told.

    Args:
        steps: in the order in which they were told.
        circumstances: by launch: named values that must be the same for its steps to be comparable.
        heartbeat: the newest one, if any.
    """

    steps: tuple[Step, ...] = ()
    circumstances: dict[int, dict[str, Any]] = field(default_factory=dict)
    heartbeat: Heartbeat | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        circumstances = [[launch, values] for launch, values in self.circumstances.items()]
        told = {"circumstances": circumstances, "steps": [one.to_json() for one in self.steps]}
        return told if self.heartbeat is None else {**told, "heartbeat": self.heartbeat.to_json()}

    @classmethod
    def of(cls, told: dict[str, Any]) -> Told:
        """Return what `to_json` wrote. Raises ValueError, TypeError, KeyError."""
        circumstances = {int(launch): dict(values) for launch, values in told["circumstances"]}
        heartbeat = Heartbeat.of(told["heartbeat"]) if "heartbeat" in told else None
        return cls(tuple(map(Step.of, told["steps"])), circumstances, heartbeat)

    def reached_by(self, launch: int) -> int:
        """Return the last step that a launch has told; 0 if it told none."""
        told = [one.step for one in self.steps if one.launch == launch]
        beat = self.heartbeat
        return max(told[-1] if told else 0, beat.step if beat is not None and beat.launch == launch else 0)


def path_of(output_dir: Path, url: str, training: int, rank: int) -> Path:
    """Return the path of a rank's file.

    Args:
        output_dir: the Trainer's.
        url: URL of the run.
        training: number of the training.
        rank: number of the rank.
    """
    run = hashlib.sha256(url.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return output_dir / ".hf_spot" / f"steps-{run}-{training}-{rank}.jsonl"


def is_told_steps(path: Path) -> bool:
    """Return whether a path is one that `path_of` gives."""
    return path.match(".hf_spot/steps-*.jsonl")


def read(path: Path) -> Told:
    """Return what a file says; nothing if it can't be read."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return Told()
    steps: list[Step] = []
    circumstances: dict[int, dict[str, Any]] = {}
    heartbeat: Heartbeat | None = None
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):  # cut short when the disk was full
            found = json.loads(line)
            if isinstance(found, dict) and "heartbeat" in found:
                heartbeat = Heartbeat.of(found["heartbeat"])
            elif isinstance(found, dict):
                circumstances[int(found["launch"])] = dict(found["circumstances"])
            else:
                steps.append(Step.of(found))
    return Told(tuple(steps), circumstances, heartbeat)


class StepFile:
    """Writes a rank's file.

    Args:
        path: path of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: FileIO | None = None

    def rewrite(self, told: Told) -> None:
        """Replace the contents. Raises OSError."""
        self.close()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        heads = [{"launch": launch, "circumstances": values} for launch, values in told.circumstances.items()]
        lines = "".join(json.dumps(head) + "\n" for head in heads) + _lines(told.steps) + _line(told.heartbeat)
        write_atomically(self._path, lines)
        self._file = FileIO(self._path, "ab")

    def append(self, steps: Iterable[Step], heartbeat: Heartbeat | None = None) -> bool:
        """Add steps and a heartbeat; return False if the file must be rewritten first. Raises OSError."""
        if self._file is None:
            return False
        data = (_lines(steps) + _line(heartbeat)).encode()
        try:
            written = self._file.write(data)
        except OSError:
            self.close()
            raise
        if written != len(data):  # the disk is nearly full
            self.close()
        return self._file is not None

    def delete(self) -> None:
        """Delete the file. Raises OSError."""
        self.close()
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # of a write that the system had postponed
                self._file.close()
            self._file = None


def _lines(steps: Iterable[Step]) -> str:
    return "".join(json.dumps(one.to_json()) + "\n" for one in steps)


def _line(heartbeat: Heartbeat | None) -> str:
    return "" if heartbeat is None else json.dumps({"heartbeat": heartbeat.to_json()}) + "\n"
