"""Whether a checkpoint that stands whole on this disk, and was never committed, may be resumed from. Pure.

It was written by an earlier launch of the same run. The journal stays the judge: what a later launch has committed, or taken
back after NaN, counts more, and so does the work of a launch on another machine, which this disk knows nothing of.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Copy:
    """One disk's part of a checkpoint.

    Args:
        launch: the launch that wrote it.
        step: optimizer steps done.
        attempt: the same on all disks of one start of the training.
        part: number of the disk.
        parts: number of disks.
    """

    launch: int
    step: int
    attempt: str
    part: int
    parts: int


@dataclass(frozen=True)
class Happened:
    """What matters here of an entry of the journal.

    Args:
        kind: of the entry.
        launch: that wrote it.
        hostname: of a claim; None for other entries.
    """

    kind: str
    launch: int
    hostname: str | None = None


def newest_on_all(disks: Sequence[Iterable[Copy]]) -> list[tuple[int, int, str]]:
    """Return launch, step and attempt of the checkpoints of which each disk has its own part, newest first.

    Args:
        disks: what each disk has, in the order of their numbers.
    """

    def has(number: int, copies: Iterable[Copy]) -> set[tuple[int, int, str]]:
        return {(one.launch, one.step, one.attempt) for one in copies if (one.part, one.parts) == (number, len(disks))}

    found = [has(number, copies) for number, copies in enumerate(disks)]
    return sorted(set.intersection(*found), reverse=True) if found else []


def why_not(launch: int, current: int, hostname: str, since: Iterable[Happened]) -> str | None:
    """Return why a launch's uncommitted checkpoint is not taken, for people; None if it may be.

    Args:
        launch: the launch that wrote it.
        current: the launch that would take it.
        hostname: of this machine.
        since: the journal's entries from the newest commit or the launch's claim on, in any order.
    """
    if launch >= current:
        return f"launch {launch} is not an earlier one"
    for one in since:
        if one.kind == "rollback" and one.launch >= launch:
            return f"launch {one.launch} took its last steps back, after NaN"
        if one.kind == "commit" and one.launch > launch:
            return f"launch {one.launch} has committed since"
        if one.kind == "claim" and launch < one.launch < current and one.hostname != hostname:
            return f"launch {one.launch} was on another machine"
    return None
