"""What to do with a notice, given its deadline and what was measured. Pure: no clock, no threads, no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from hf_spot.notices.notice import NoticeKind
from hf_spot.timeouts import HASTE_S

SAFETY = 1.5  # a fifth slower than usual, where what was measured was a fifth faster: see tests/policy/deadlines.py


class Action(str, Enum):
    """What the callback does at the end of this step."""

    GO_ON = "go on"
    SAVE_AND_GO_ON = "save and go on"
    SAVE_AND_STOP = "save and stop"
    FINISH_UPLOAD_AND_STOP = "finish the upload in flight and stop"


@dataclass(frozen=True)
class Measured:
    """What this run has measured; None where nothing was measured yet, or nothing is there.

    Args:
        save_s: how long Trainer's save takes.
        size_bytes: of a checkpoint.
        bytes_per_s: throughput of uploads.
        commit_s: what an upload needs besides, whatever its size.
        in_flight_bytes: what the upload under way has still to send.
        waiting_bytes: of the newest checkpoint that waits behind it.
    """

    save_s: float | None = None
    size_bytes: int | None = None
    bytes_per_s: float | None = None
    commit_s: float = 0.0
    in_flight_bytes: int | None = None
    waiting_bytes: int | None = None

    def upload_s(self, size_bytes: int | None) -> float | None:
        """Seconds from a save to its commit, for so many bytes; None where that is not known."""
        if size_bytes is None or not self.bytes_per_s:
            return None
        return self.commit_s + size_bytes / self.bytes_per_s

    @property
    def new_s(self) -> float | None:
        """Seconds that a new save and its upload need; None before there was one of each."""
        upload_s = self.upload_s(self.size_bytes)
        return None if self.save_s is None or upload_s is None else self.save_s + upload_s


@dataclass(frozen=True)
class Decision:
    """An action, and why it was chosen: one line for the journal."""

    action: Action
    why: str


def decide(kind: NoticeKind, seconds_left: float | None, measured: Measured) -> Decision:
    """The action for a notice, at the end of a step.

    A new save is worth the most. It is given up only where it can't be committed in time and would keep disk and processor
    from an upload that can.

    Args:
        kind: of the notice.
        seconds_left: until the deadline; None when the notice names none.
        measured: by this run.
    """
    if kind is NoticeKind.CANCELLED:
        return Decision(Action.GO_ON, "the notice was cancelled")
    if kind is NoticeKind.ADVISORY:
        return Decision(Action.SAVE_AND_GO_ON, "the machine may be taken")
    if seconds_left is None:
        return Decision(Action.SAVE_AND_STOP, "the notice names no deadline")
    left, save_s = f"{seconds_left:.0f} s left", measured.save_s
    if save_s is None:
        return Decision(Action.SAVE_AND_STOP, f"{left}; no save was measured yet")
    new_s = save_s if measured.new_s is None else measured.new_s  # the first upload has not told its throughput
    needed = f"about {new_s:.0f} s needed for a new save"
    if SAFETY * new_s <= seconds_left:
        return Decision(Action.SAVE_AND_STOP, f"{left}, {needed}")
    if measured.in_flight_bytes is None:
        return Decision(Action.SAVE_AND_STOP, f"{left}, {needed}: it may not fit, but nothing else is under way")
    in_flight_s = measured.upload_s(measured.in_flight_bytes)
    if in_flight_s is not None and SAFETY * (in_flight_s + save_s) <= seconds_left:  # even if nothing is sent during the save
        return Decision(Action.SAVE_AND_STOP, f"{left}, {needed}: it may not fit, but the upload in flight will")
    return Decision(Action.FINISH_UPLOAD_AND_STOP, f"{left}, {needed}: what is in flight comes first")


def gives_way(seconds_left: float | None, measured: Measured) -> bool:
    """Whether the upload under way has to end, unfinished, for the newer checkpoint that waits behind it.

    It goes on where there should be time for both, and where only it can be committed. It gives way to a newer one that
    fits alone; where neither fits, to a smaller one.

    Args:
        seconds_left: until the deadline; None when the notice names none.
        measured: by this run.
    """
    in_flight_s, waiting_s = measured.upload_s(measured.in_flight_bytes), measured.upload_s(measured.waiting_bytes)
    if seconds_left is None or in_flight_s is None or waiting_s is None:
        return False
    if in_flight_s + waiting_s <= seconds_left:  # the first, at least, will be committed
        return False
    return SAFETY * waiting_s <= seconds_left or waiting_s < in_flight_s


def leaves_step(seconds_left: float | None, rest_of_step_s: float, measured: Measured) -> bool:
    """Whether to stop between two micro-batches: the gradients so far are given up, and the next launch computes them again.

    A step that can be finished in time is finished, because it is work done.

    Args:
        seconds_left: until the deadline; None when the notice names none.
        rest_of_step_s: what the step should still need.
        measured: by this run; where a save and its upload are not known, half of the time left is kept for them.
    """
    if seconds_left is None:
        return rest_of_step_s > HASTE_S
    if measured.new_s is None:
        return rest_of_step_s > seconds_left / 2
    return SAFETY * (rest_of_step_s + measured.new_s) > seconds_left
