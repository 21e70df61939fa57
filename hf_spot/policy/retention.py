"""Which checkpoints a run keeps. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar


class Kept(Protocol):
    """The properties of a checkpoint that matter for retention."""

    @property
    def training(self) -> int:
        """Return the number of the script's training that it belongs to."""

    @property
    def step(self) -> int:
        """Return the number of optimizer steps done."""

    @property
    def best(self) -> bool:
        """Return whether Trainer considers it the best of its training."""


T = TypeVar("T", bound=Kept)


def to_prune(checkpoints: Sequence[T], save_total_limit: int | None) -> list[T]:
    """Return the checkpoints to delete, oldest first.

    The newest ``save_total_limit`` are kept, as with Trainer's argument of that name, and so are the best and the newest of
    every training: without them a script with several trainings could not resume.

    Args:
        checkpoints: all checkpoints, oldest commit first.
        save_total_limit: number to keep; None or 0 keeps everything.
    """
    if not save_total_limit:
        return []
    newest_of = {ref.training: index for index, ref in enumerate(checkpoints)}
    old = list(enumerate(checkpoints))[:-save_total_limit]
    return [ref for index, ref in old if not ref.best and newest_of[ref.training] != index]


def milestones(checkpoints: Sequence[T], every: int, kept: Sequence[Kept] = ()) -> list[T]:
    """Return the checkpoints to keep for good: of each training the first one at or after each multiple of ``every`` steps.

    Args:
        checkpoints: all checkpoints, oldest commit first.
        every: number of steps; positive.
        kept: those that are kept in another form, and count as the first ones.
    """
    known, found = {(ref.training, ref.step // every) for ref in kept}, []
    for ref in checkpoints:
        span = ref.training, ref.step // every
        if span[1] and span not in known:
            known.add(span)
            found.append(ref)
    return found
