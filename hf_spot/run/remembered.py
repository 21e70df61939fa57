"""What this machine remembers of runs that have ended, so that listing a thousand of them takes a dozen requests.

Two things make it true. A listing in groups shows each run's ``tip.json``, and when it was written. And every launch, push and
prune writes ``tip.json`` before it adds an entry to a run that has ended (`hf_spot.run.journal`); versions without this file
wrote it right after the entry. While that object is as it was, the run is, too. Only runs that have ended are remembered.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from hf_spot.runtime import write_atomically

_FORMAT = 1
_FOLDER = "hf_spot/runs"  # below the folder for what programs may forget


@dataclass(frozen=True)
class Remembered:
    """A run that had ended when it was read.

    Args:
        name: its place below the URL that was listed.
        tip: what the listing told about its ``tip.json``.
        number: of its newest entry.
        launch: number of its newest launch.
        ended: how that ended.
        step: the newest committed step.
        max_steps: of how many; None if unknown.
        committed: when that was committed, as ISO 8601; None without a checkpoint.
        heard: time of its newest entry, as ISO 8601.
        size_bytes: of everything in it.
    """

    name: str
    tip: str
    number: int
    launch: int
    ended: str
    step: int
    max_steps: int | None
    committed: str | None
    heard: str
    size_bytes: int

    @classmethod
    def of(cls, told: Any) -> Remembered:
        """Return what `asdict` made. Raises ValueError, TypeError, KeyError."""
        found = cls(**told)
        times = [datetime.fromisoformat(one) for one in (found.heard, found.committed) if one is not None]
        numbers = [found.number, found.launch, found.step, found.size_bytes, found.max_steps or 0]
        texts = [found.name, found.tip, found.ended]
        if not all(type(one) is int and one >= 0 for one in numbers) or not all(isinstance(one, str) for one in texts):
            raise TypeError(f"not a run: {told!r}")
        if any(one.tzinfo is None for one in times):
            raise ValueError(f"a time without a zone: {told!r}")
        return found


def path_of(url: str) -> Path:
    """Return the file for the runs below a URL."""
    above = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(above) / _FOLDER / f"{hashlib.sha256(url.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.json"


def recall(url: str) -> dict[str, Remembered]:
    """Return what is remembered of the runs below a URL, by their names; nothing if the file is missing or damaged."""
    try:
        told = json.loads(path_of(url).read_bytes())
        if told["format"] != _FORMAT or told["url"] != url:
            return {}
        return {one.name: one for one in map(Remembered.of, told["runs"])}
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, RecursionError):
        return {}


def remember(url: str, runs: Iterable[Remembered]) -> None:
    """Replace what is remembered of the runs below a URL. Where nothing can be written, they are read again the next time."""
    try:
        path = path_of(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        told = {"format": _FORMAT, "url": url, "runs": [asdict(one) for one in runs]}
        write_atomically(path, json.dumps(told))
    except (OSError, RuntimeError):
        return
