"""Where in a pass over the data a checkpoint was saved, and which events Trainer repeats or omits when it is resumed. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Began:
    """The pass under way, as recorded in each commit.

    Args:
        shown: what callbacks saw in Trainer's state at the pass's ``on_epoch_begin``.
        end_was_told: whether callbacks got ``on_epoch_end``, other than because a notice ends the launch.
        is_over: whether they got it because no data is left in this pass.
    """

    shown: Mapping[str, Any] = field(default_factory=dict)
    end_was_told: bool = False
    is_over: bool = False

    def to_details(self) -> dict[str, Any]:
        """Return this as JSON."""
        return {"began": dict(self.shown), "end_was_told": self.end_was_told, "is_over": self.is_over}


@dataclass(frozen=True)
class Place:
    """Where a resumed training continues.

    Args:
        number: the pass to continue, counted from 0.
        is_in_middle: whether batches of this pass have been trained.
        is_repeated: whether callbacks got ``on_epoch_begin`` of this pass before the checkpoint was saved.
        owes_end: whether callbacks are still to get ``on_epoch_end`` of the pass before.
        shown: what they must see in Trainer's state at a repeated ``on_epoch_begin``.
    """

    number: int
    is_in_middle: bool
    is_repeated: bool
    owes_end: bool = False
    shown: Mapping[str, Any] = field(default_factory=dict)


def place_of(began: Mapping[str, Any] | None, epoch: float, step: int, *, has_length: bool) -> Place:
    """Return where a training continues.

    Args:
        began: from `Began.to_details`; None in checkpoints of older versions.
        epoch: ``state.epoch`` at the save: its integer part counts passes.
        step: the optimizer steps done.
        has_length: whether the length of a pass is known. Otherwise Trainer finds the end of a pass by reading on.
    """
    number, at_boundary = int(epoch), has_length and float(epoch).is_integer()
    if began is None:
        shown = {"epoch": math.floor(epoch)} if has_length and not at_boundary else {}
        return Place(number, not at_boundary, not at_boundary, shown=shown)
    if not has_length and began["is_over"]:
        return Place(number + 1, is_in_middle=False, is_repeated=False)
    if not at_boundary:
        return Place(number, is_in_middle=True, is_repeated=True, shown=began["began"])
    if step > began["began"].get("global_step", 0):
        return Place(number, is_in_middle=False, is_repeated=False, owes_end=not began["end_was_told"])
    return Place(number, is_in_middle=False, is_repeated=True, shown=began["began"])
