"""What to do with a notice, given its deadline and what was measured. Pure: no clock, no threads, no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from hf_spot.notices.notice import NoticeKind

SAFETY = 1.25  # a save under pressure has been slower than the mean of those before it
HASTE_S = 5.0  # what a step may still take after a notice that names no deadline; Kubernetes on spot nodes gives 15 s in all


class Action(str, Enum):
    """What the callback does at the end of this step."""

    GO_ON = "go on"
    SAVE_AND_GO_ON = "save and go on"
    SAVE_AND_STOP = "save and stop"
    FINISH_UPLOAD_AND_STOP = "finish the upload in flight and stop"


@dataclass(frozen=True)
class Measured:
    """Times of this run so far; None where nothing was measured yet.

    Args:
        save_s: how long Trainer's save takes.
        upload_s: from a finished save to its commit.
        in_flight_s: what an upload under way still needs; None when none is under way.
    """

    save_s: float | None = None
    upload_s: float | None = None
    in_flight_s: float | None = None


@dataclass(frozen=True)
class Decision:
    """An action, why it was chosen (one line for the journal), and whether the upload in flight must give way to it."""

    action: Action
    why: str
    cancel_in_flight: bool = False


def decide(kind: NoticeKind, seconds_left: float | None, measured: Measured) -> Decision:
    """The action for a notice.

    A new save is worth the most, so it is tried whenever it may fit: always when the deadline or the times are unknown.
    When it can't fit, an upload under way that can still be committed beats a save that will be torn off.

    Args:
        kind: of the notice.
        seconds_left: until the deadline; None when the notice names none.
        measured: times of this run.
    """
    if kind is NoticeKind.CANCELLED:
        return Decision(Action.GO_ON, "the notice was cancelled")
    if kind is NoticeKind.ADVISORY:
        return Decision(Action.SAVE_AND_GO_ON, "the machine may be taken")
    if seconds_left is None:
        return Decision(Action.SAVE_AND_STOP, "the notice names no deadline")
    if measured.save_s is None or measured.upload_s is None:
        return Decision(Action.SAVE_AND_STOP, f"{seconds_left:.0f} s left; no save was measured yet")
    needed = SAFETY * (measured.save_s + measured.upload_s)
    in_flight = measured.in_flight_s
    if in_flight is None:
        fits = "should fit" if needed <= seconds_left else "may not fit, but nothing else is under way"
        return Decision(Action.SAVE_AND_STOP, f"{seconds_left:.0f} s left, about {needed:.0f} s needed: it {fits}")
    # The upload under way goes on during the save; only what is left of it afterwards delays the new one.
    if needed + SAFETY * max(0.0, in_flight - measured.save_s) <= seconds_left:
        return Decision(Action.SAVE_AND_STOP, f"{seconds_left:.0f} s left: time for the upload in flight and a new save")
    if needed <= seconds_left:
        return Decision(Action.SAVE_AND_STOP, f"{seconds_left:.0f} s left: time for a new save only", cancel_in_flight=True)
    return Decision(
        Action.FINISH_UPLOAD_AND_STOP,
        f"{seconds_left:.0f} s left, about {needed:.0f} s needed for a new save: the upload in flight is what can be committed",
    )


def leaves_step(seconds_left: float | None, rest_of_step_s: float, measured: Measured) -> bool:
    """Whether to stop between two micro-batches: the gradients so far are given up, and the next launch computes them again.

    A step that can be finished in time is finished, because it is work done.

    Args:
        seconds_left: until the deadline; None when the notice names none.
        rest_of_step_s: what the step should still need.
        measured: times of this run; where they are not known, half of the time left is kept for the save.
    """
    if seconds_left is None:
        return rest_of_step_s > HASTE_S
    if measured.save_s is None or measured.upload_s is None:
        return rest_of_step_s > seconds_left / 2
    return SAFETY * (rest_of_step_s + measured.save_s + measured.upload_s) > seconds_left
