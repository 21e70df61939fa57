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

    @property
    def added(self) -> bool:
        """Return whether it was added to Trainer's own saves, so that less is lost if the training is interrupted."""


T = TypeVar("T", bound=Kept)

_MOST_ADDED = 2  # the newest, and one in case it is damaged


def to_prune(checkpoints: Sequence[T], save_total_limit: int | None) -> list[T]:
    """Return the checkpoints to delete, oldest first.

    The newest ``save_total_limit`` of those that Trainer itself has saved are kept, as with its argument of that name, and so
    are the best and the newest of every training: without them a script with several trainings could not resume. An added
    checkpoint is kept while it is one of the two newest of all, or the newest if the limit is 1, and takes nobody's place.

    Args:
        checkpoints: all checkpoints, oldest commit first.
        save_total_limit: number to keep; None or 0 keeps everything but added checkpoints.
    """
    newest_of = {ref.training: index for index, ref in enumerate(checkpoints)}
    scheduled = [index for index, ref in enumerate(checkpoints) if not ref.added]
    kept = {*(scheduled[-save_total_limit:] if save_total_limit else scheduled), *newest_of.values()}
    first_added = len(checkpoints) - min(save_total_limit or _MOST_ADDED, _MOST_ADDED)
    return [ref for index, ref in enumerate(checkpoints) if index < first_added and index not in kept and not ref.best]


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
