"""How a launch ended, whether to restart it, and how long to wait for it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from hf_spot.errors import EXIT_FENCED, EXIT_FINISHED, EXIT_PREEMPTED, EXIT_USAGE
from hf_spot.policy.words import counted
from hf_spot.timeouts import (
    FIRST_PAUSE_S,
    IDLE_GRACE_S,
    LATE_S,
    LEFT_BEHIND_S,
    LONGEST_PAUSE_S,
    NEIGHBOUR_FAILED_S,
    SHORT_PAUSE_S,
)


class Verdict(str, Enum):
    """How a launch ended."""

    FINISHED = "finished"
    PREEMPTED = "preempted"
    FENCED = "fenced"
    FAILED = "failed"
    LOST = "lost"  # of another machine only: it stopped without reporting an end


def judge(exit_code: int, ended: str | None, *, fenced: bool, noticed: bool, lost: bool = False) -> Verdict:
    """Return how a launch ended.

    The journal counts more than the exit code: torchrun turns every code into 1, and a script may catch `SystemExit`.

    Args:
        exit_code: exit code of the training process.
        ended: the end that the launch's own workers wrote into the journal, if any.
        fenced: a newer launch owns the run.
        noticed: a TERMINATE was detected.
        lost: another machine of this launch stopped without reporting an end.
    """
    if fenced or exit_code == EXIT_FENCED:
        return Verdict.FENCED
    if ended == "preempted" or exit_code == EXIT_PREEMPTED:
        return Verdict.PREEMPTED
    if exit_code == EXIT_FINISHED:
        return Verdict.FINISHED
    return Verdict.PREEMPTED if noticed or lost else Verdict.FAILED


def exit_code(of_command: int, told: int | None, *, as_it_is: bool) -> int:
    """Return the exit code that a launch has ended with.

    Args:
        of_command: exit code of the command.
        told: the first exit code that a process of it reported, if any: torchrun turns every code into 1.
        as_it_is: the command is any program: it may have dealt with the failure of a process, and its own code counts, except
            for codes of hf_spot.
    """
    if not told or (as_it_is and of_command == EXIT_FINISHED and told not in (EXIT_PREEMPTED, EXIT_FENCED)):
        return of_command
    return told


def waits_for_the_rest(since_s: float, *, training: bool | None, may_train: bool) -> bool:
    """Return whether to wait for the processes that a command has left behind, once it has ended with 0.

    Args:
        since_s: seconds since then.
        training: whether a training is running; None if none has begun in this launch.
        may_train: one of them may be about to begin one.
    """
    return training or (training is None and may_train and since_s < LEFT_BEHIND_S)


def outlives_s(other: Verdict, drain_timeout_s: float, *, has_begun: bool = True) -> float:
    """Return the seconds that the training on this machine may continue after that of another machine has ended.

    Args:
        other: how it ended there.
        drain_timeout_s: maximum wait for the last upload.
        has_begun: whether it has begun on this machine; before that its ranks only wait for those that have ended.
    """
    if other is Verdict.LOST:
        return 0.0
    if other is Verdict.PREEMPTED and not has_begun:
        return NEIGHBOUR_FAILED_S
    return NEIGHBOUR_FAILED_S if other in (Verdict.FAILED, Verdict.FENCED) else drain_timeout_s + LATE_S


def has_left(other: Verdict, code: int, own_code: int | None = None) -> bool:
    """Return whether another of the machines that come and go takes no part in the next launch, which begins without it.

    Its launcher does not start again what can't be used on that machine, such as a disk that is full.

    Args:
        other: how it ended there.
        code: its exit code there.
        own_code: the exit code on this machine; None while its training is running.
    """
    return other is Verdict.LOST or (other is Verdict.FAILED and code == EXIT_USAGE != own_code)


def may_restart(exit_code: int, fruitless: int, max_restarts: int) -> bool:
    """Return whether to restart after a failed launch.

    Args:
        exit_code: exit code of the launch; 2 is a usage error, which would fail again.
        fruitless: launches in a row, including this one, that committed nothing.
        max_restarts: how many of them may be restarted.
    """
    return exit_code != EXIT_USAGE and max_restarts > 0 and fruitless <= max_restarts


def steps_in_words(steps: Mapping[int, tuple[int, int]]) -> str:
    """Return a sentence about what is committed of a launch's trainings, and what will be redone.

    Args:
        steps: the last committed and the last finished step of each training, by its number.
    """
    redone = sum(max(0, finished - committed) for committed, finished in steps.values())
    if len(steps) < 2:
        committed = next((one for one, _ in steps.values()), 0)
        return f"step {committed} is committed" + (f"; {counted(redone, 'step')} after it will be redone" if redone else "")
    told = ", ".join(f"step {committed} of training {number}" for number, (committed, _) in steps.items())
    return f"{told} are committed" + (f"; {counted(redone, 'step')} after them will be redone" if redone else "")


def pause_s(fruitless: int) -> float:
    """Return the seconds to wait before the next launch: hardly any after one that made progress; they double after each
    fruitless one."""
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (fruitless - 1)) if fruitless else SHORT_PAUSE_S


def patience_s(seconds_left: float | None, *, training: bool, drain_timeout_s: float, trained_s: float = 0.0) -> float:
    """Return the seconds after a TERMINATE for which the training process may run before it is killed.

    Args:
        seconds_left: seconds to the deadline when the notice arrived; None if it names none.
        training: ``trainer.train()`` is running, so there is something to save.
        drain_timeout_s: maximum wait for the last upload without a deadline.
        trained_s: seconds from the TERMINATE until ``trainer.train()`` ended, including the save; the script gets a separate
            grace period for what it does afterwards.
    """
    if seconds_left is None:
        return drain_timeout_s if training else trained_s + IDLE_GRACE_S
    if training:
        return max(0.0, seconds_left) + LATE_S
    return max(0.0, seconds_left, trained_s + IDLE_GRACE_S if trained_s else 0.0)
