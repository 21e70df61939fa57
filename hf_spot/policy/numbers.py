"""What to do about a checkpoint with numbers that are not finite. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

HOW_TO_GET_FINITE = (
    "a lower learning rate, max_grad_norm, or other data after the last commit, from which the same command resumes; to "
    "continue without saving until all numbers are finite: --on-nan go-on"
)
_FEW = 3  # names in a message


class Answer(Enum):
    """What happens to a save."""

    MAKE = "save"
    SKIP = "don't save, and continue"
    ROLL_BACK = "don't save, and resume from the newest checkpoint, past the steps that went wrong"
    STOP = "don't save, and end the training with an error"


def answer(wrong: Sequence[str], *, on_nan: str, stopping: bool) -> Answer:
    """Return what to do about a save: a checkpoint with a number that is not finite is never made.

    Args:
        wrong: names of what is not finite, on all ranks.
        on_nan: the setting: ``stop``, ``rollback`` or ``go-on``.
        stopping: the training is ending for a notice. It ends as preempted, and the last commit stands: whether the next
            launch meets the same numbers is found then.
    """
    if not wrong:
        return Answer.MAKE
    if stopping:
        return Answer.SKIP
    return {"stop": Answer.STOP, "rollback": Answer.ROLL_BACK}.get(on_nan, Answer.SKIP)


def in_words(wrong: Sequence[str], step: int) -> str:
    """Return what is wrong, for people.

    Args:
        wrong: names of what is not finite, on all ranks.
        step: the step that would have been saved.
    """
    names = list(dict.fromkeys(wrong))
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return f"step {step} is not saved: not finite (NaN or infinity): {', '.join(names[:_FEW])}{more}"
