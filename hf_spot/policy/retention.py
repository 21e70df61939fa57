"""Which checkpoints stay in the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar


class Kept(Protocol):
    """What retention needs to know of a checkpoint."""

    @property
    def stage(self) -> int:
        """Which training of the script it belongs to."""

    @property
    def best(self) -> bool:
        """Trainer holds it for the best of its stage."""


T = TypeVar("T", bound=Kept)


def to_prune(checkpoints: Sequence[T], save_total_limit: int | None) -> list[T]:
    """The checkpoints that may go, oldest first.

    The newest ``save_total_limit`` stay, as with Trainer's argument of that name, and so do the best of every stage and
    the newest of every stage: without them a script that trains twice could not go on.

    Args:
        checkpoints: oldest commit first.
        save_total_limit: None or 0 keeps everything.
    """
    if not save_total_limit:
        return []
    newest_of_stage = {ref.stage: index for index, ref in enumerate(checkpoints)}
    old = list(enumerate(checkpoints))[:-save_total_limit]
    return [ref for index, ref in old if not ref.best and newest_of_stage[ref.stage] != index]
