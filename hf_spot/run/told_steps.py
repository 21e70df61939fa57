"""What a launch tells about its steps, in a file on the disk of its machine, so that the next launch can compare.

The file is in ``output_dir/.hf_spot``, one for each training and rank: a line of JSON for each launch, which says under which
circumstances it trains, and one for each step. It survives the death of every process. A line that was cut short is ignored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from hf_spot.policy.redone import Step
from hf_spot.runtime import write_atomically


@dataclass(frozen=True)
class Told:
    """What launches have told.

    Args:
        steps: in the order in which they were told.
        circumstances: by launch: named values that must be the same for its steps to be comparable.
    """

    steps: tuple[Step, ...] = ()
    circumstances: dict[int, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        circumstances = [[launch, values] for launch, values in self.circumstances.items()]
        return {"circumstances": circumstances, "steps": [one.to_json() for one in self.steps]}

    @classmethod
    def of(cls, told: dict[str, Any]) -> Told:
        """Return what `to_json` wrote. Raises ValueError, TypeError, KeyError."""
        circumstances = {int(launch): dict(values) for launch, values in told["circumstances"]}
        return cls(tuple(map(Step.of, told["steps"])), circumstances)


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
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):  # cut short when the disk was full
            found = json.loads(line)
            if isinstance(found, dict):
                circumstances[int(found["launch"])] = dict(found["circumstances"])
            else:
                steps.append(Step.of(found))
    return Told(tuple(steps), circumstances)


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
        write_atomically(self._path, "".join(json.dumps(head) + "\n" for head in heads) + _lines(told.steps))
        self._file = FileIO(self._path, "ab")

    def append(self, steps: Iterable[Step]) -> bool:
        """Add steps; return False if the file must be rewritten first. Raises OSError."""
        if self._file is None:
            return False
        data = _lines(steps).encode()
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
