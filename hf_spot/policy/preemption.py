"""How to act on a notice, given its deadline and the measured times. Pure: no clock, no threads, no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from hf_spot.notices.notice import NoticeKind
from hf_spot.timeouts import HASTE_S

SAFETY = 1.5  # covers a save a fifth slower than usual, measured a fifth too fast: see tests/policy/deadlines.py


class Action(str, Enum):
    """What the callback does at the end of this step."""

    GO_ON = "go on"
    SAVE_AND_GO_ON = "save and go on"
    SAVE_AND_STOP = "save and stop"
    FINISH_UPLOAD_AND_STOP = "finish the upload in flight and stop"


@dataclass(frozen=True)
class Measured:
    """The measurements of this run; None where nothing has been measured yet, or nothing is pending.

    Args:
        save_s: seconds of a save by Trainer.
        size_bytes: size of a checkpoint.
        bytes_per_s: throughput of uploads.
        commit_s: fixed seconds of an upload, whatever its size.
        in_flight_bytes: bytes that the current upload still has to send.
        waiting_bytes: size of the newest checkpoint that waits behind it.
    """

    save_s: float | None = None
    size_bytes: int | None = None
    bytes_per_s: float | None = None
    commit_s: float = 0.0
    in_flight_bytes: int | None = None
    waiting_bytes: int | None = None

    def upload_s(self, size_bytes: int | None) -> float | None:
        """Return the seconds from a save to its commit for a size; None if unknown."""
        if size_bytes is None or not self.bytes_per_s:
            return None
        return self.commit_s + size_bytes / self.bytes_per_s

    @property
    def new_s(self) -> float | None:
        """Return the seconds that a new save and its upload need; None before the first of each."""
        upload_s = self.upload_s(self.size_bytes)
        return None if self.save_s is None or upload_s is None else self.save_s + upload_s


@dataclass(frozen=True)
class Decision:
    """An action and its reason, one line for the journal."""

    action: Action
    why: str


def decide(kind: NoticeKind, seconds_left: float | None, measured: Measured) -> Decision:
    """Return the action for a notice, at the end of a step.

    A new save preserves the most work. It is skipped only if it can't be committed in time and would slow down an upload
    that can.

    Args:
        kind: kind of the notice.
        seconds_left: seconds until the deadline; None if the notice names none.
        measured: measurements of this run.
    """
    if kind is NoticeKind.CANCELLED:
        return Decision(Action.GO_ON, "the notice was cancelled")
    if kind is NoticeKind.ADVISORY:
        return Decision(Action.SAVE_AND_GO_ON, "the machine may be taken away")
    if seconds_left is None:
        return Decision(Action.SAVE_AND_STOP, "the notice names no deadline")
    left, save_s = f"{seconds_left:.0f} s left", measured.save_s
    if save_s is None:
        return Decision(Action.SAVE_AND_STOP, f"{left}; no save was measured yet")
    new_s = save_s if measured.new_s is None else measured.new_s  # before the first upload its throughput is unknown
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
    """Return whether the current upload should be aborted for the newer checkpoint that waits behind it.

    It continues if there should be time for both, or if only it can be committed. It is aborted for a newer checkpoint that
    fits alone or, if neither fits, for a smaller one.

    Args:
        seconds_left: seconds until the deadline; None if the notice names none.
        measured: measurements of this run.
    """
    in_flight_s, waiting_s = measured.upload_s(measured.in_flight_bytes), measured.upload_s(measured.waiting_bytes)
    if seconds_left is None or in_flight_s is None or waiting_s is None:
        return False
    if in_flight_s + waiting_s <= seconds_left:  # the first, at least, will be committed
        return False
    return SAFETY * waiting_s <= seconds_left or waiting_s < in_flight_s


def leaves_step(seconds_left: float | None, rest_of_step_s: float, measured: Measured) -> bool:
    """Return whether to stop between two micro-batches. The next launch then recomputes the gradients of this step.

    A step that can be finished in time is finished, so that its work counts.

    Args:
        seconds_left: seconds until the deadline; None if the notice names none.
        rest_of_step_s: estimated seconds that the step still needs.
        measured: measurements of this run; if a save and its upload are unknown, half of the time left is reserved for them.
    """
    if seconds_left is None:
        return rest_of_step_s > HASTE_S
    if measured.new_s is None:
        return rest_of_step_s > seconds_left / 2
    return SAFETY * (rest_of_step_s + measured.new_s) > seconds_left
