"""What a launch came to, whether to start another, and when to stop waiting for one. Pure."""

from __future__ import annotations

from enum import Enum

from hf_spot.errors import EXIT_FENCED, EXIT_FINISHED, EXIT_PREEMPTED, EXIT_USAGE
from hf_spot.timeouts import FIRST_PAUSE_S, IDLE_GRACE_S, LATE_S, LONGEST_PAUSE_S, NEIGHBOUR_FAILED_S


class Verdict(str, Enum):
    """How a launch ended."""

    FINISHED = "finished"
    PREEMPTED = "preempted"
    FENCED = "fenced"
    FAILED = "failed"
    LOST = "lost"  # of another machine only: it went without a word


def judge(exit_code: int, ended: str | None, *, fenced: bool, noticed: bool, lost: bool = False) -> Verdict:
    """How a launch ended.

    The journal counts more than the exit code: torchrun turns every code into 1, and a script may catch `SystemExit`.

    Args:
        exit_code: of the training process.
        ended: what the launch's own workers wrote into the journal, if anything.
        fenced: a newer launch owns the run.
        noticed: a TERMINATE was heard.
        lost: another machine of this launch went without a word.
    """
    if fenced or exit_code == EXIT_FENCED:
        return Verdict.FENCED
    if ended == "preempted" or exit_code == EXIT_PREEMPTED:
        return Verdict.PREEMPTED
    if exit_code == EXIT_FINISHED:
        return Verdict.FINISHED
    return Verdict.PREEMPTED if noticed or lost else Verdict.FAILED


def outlives_s(other: Verdict, drain_timeout_s: float) -> float:
    """How many seconds the training of this machine may run on when that of another machine has ended.

    Args:
        other: how it ended there.
        drain_timeout_s: the patience for the last upload.
    """
    if other is Verdict.LOST:
        return 0.0
    return NEIGHBOUR_FAILED_S if other in (Verdict.FAILED, Verdict.FENCED) else drain_timeout_s + LATE_S


def may_restart(exit_code: int, fruitless: int, max_restarts: int) -> bool:
    """Whether to start again after a failed launch.

    Args:
        exit_code: of the launch; 2 is a wrong command line or setting, which the next launch would meet again.
        fruitless: launches in a row, this one included, that committed nothing.
        max_restarts: how many of them may be followed by another.
    """
    return exit_code != EXIT_USAGE and max_restarts > 0 and fruitless <= max_restarts


def pause_s(fruitless: int) -> float:
    """Seconds before the next launch: twice as long after each fruitless one."""
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** max(0, fruitless - 1))


def patience_s(seconds_left: float | None, *, training: bool, drain_timeout_s: float, trained_s: float = 0.0) -> float:
    """How many seconds after a TERMINATE the training process may still run before it is killed.

    Args:
        seconds_left: until the deadline when the notice came; None when it names none.
        training: ``trainer.train()`` is running: there is something to save.
        drain_timeout_s: the patience for the last upload without a deadline.
        trained_s: seconds after the TERMINATE until ``trainer.train()`` ended, with the save; what the script does when that is
            done has its own grace.
    """
    if seconds_left is None:
        return drain_timeout_s if training else trained_s + IDLE_GRACE_S
    return max(0.0, seconds_left) + (LATE_S if training else 0.0)
