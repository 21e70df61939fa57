"""Which training of a run a call of ``trainer.train()`` is: known by what it trains, not by how many came before. Pure.

A training is described by named values: what its parameters look like, its data, where it writes, its settings. A script that
is started again describes its trainings the same way, whatever others it skips or trains beside them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Description = Mapping[str, Any]

PARAMETERS = "parameters"
WEIGHTS = "weights"
FOLDER = "output_dir"
OF_MODEL = "model."  # at the beginning of names of settings of a model and its adapters
LENGTH = frozenset({"max_steps", "num_train_epochs"})
BATCH = frozenset({"per_device_train_batch_size", "gradient_accumulation_steps"})


@dataclass(frozen=True)
class Known:
    """A training that the run knows.

    Args:
        number: its number.
        description: what it trains; None if the hf_spot that saved it described no trainings.
        complete: whether it has reached its end.
        at_work: whether another process of this launch trains it, or has trained it.
        done_here: whether this process has finished it.
        repeated: whether this is the notebook cell that has finished it, run again.
    """

    number: int
    description: Description | None
    complete: bool = False
    at_work: bool = False
    done_here: bool = False
    repeated: bool = False


@dataclass(frozen=True)
class Match:
    """What was found.

    Args:
        number: of the training; a new one if the run knew none like it.
        known: the training it is; None for a new one.
        differences: the names of values that have changed, against the known one, or against the most similar one if it is new.
        similar: the known training that is most similar to a new one.
    """

    number: int
    known: Known | None = None
    differences: tuple[str, ...] = ()
    similar: Known | None = None


def match(mine: Description, trainings: Sequence[Known], *, before: int, first_is_known: bool = False) -> Match:
    """Return which training this is.

    It is one with the same description, or else the one that it differs least from, if only what a user changes between two
    launches differs: see `_may_be`. Otherwise it is a new one.

    Args:
        mine: describes the training that begins.
        trainings: those that the run knows, in the order of their numbers.
        before: number of trainings that this process has finished. It tells those apart that nobody has described.
        first_is_known: whether the first training of a process is one that the run knows, if there is one: a custom loop with
            another model is a mistake rather than another training.
    """
    left = [one for one in trainings if one.repeated or not one.done_here]
    told = [(one, differences(one.description, mine)) for one in left if one.description is not None]
    for one, changed in told:
        if not changed or (one.repeated and set(changed) <= {WEIGHTS}):
            return Match(one.number, one)
    for one in left:
        if one.description is None and one.number == before + 1:
            return Match(one.number, one)
    compared = [(one, changed) for one, changed in told if not one.at_work and not one.repeated and PARAMETERS not in changed]
    nearest = sorted(compared, key=lambda each: (len(each[1]), each[0].complete, each[0].number))
    for one, changed in nearest:
        if _may_be(one, changed):
            return Match(one.number, one, changed)
    idle = [one for one in trainings if not one.at_work]
    if first_is_known and before == 0 and idle:
        return Match(idle[-1].number, idle[-1], differences(idle[-1].description or {}, mine))
    number = max((one.number for one in trainings), default=0) + 1
    return Match(number, None, nearest[0][1], nearest[0][0]) if nearest else Match(number)


def differences(before: Description, now: Description) -> tuple[str, ...]:
    """Return the names of the values that differ. What only one of them has was not known to the other's hf_spot or libraries,
    and what is None could not be looked at."""
    both = (name for name in now if name in before)
    return tuple(name for name in both if before[name] != now[name] and None not in (before[name], now[name]))


def steps_left(before: Description, now: Description, *, step: int, max_steps: int | None) -> bool | None:
    """Return whether a training goes on after a step; None if its length can't be told.

    Args:
        before: what it was when the step was saved.
        now: what it is.
        step: optimizer steps done.
        max_steps: length of the whole training, as it was then.
    """
    wanted = int(now.get("max_steps", -1))
    if wanted > 0:
        return wanted > step
    if not max_steps or int(before.get("max_steps", -1)) > 0 or "num_train_epochs" not in before:
        return None
    return max_steps * float(now["num_train_epochs"]) / float(before["num_train_epochs"]) > step


def _may_be(one: Known, changed: Collection[str]) -> bool:
    """Return whether a training with these differences is a known one that a user has changed, rather than another.

    A complete training can only have become longer, or have moved: scripts leave out what they have trained, and begin
    the next one. An incomplete one may have changed in anything, or moved, but not both: trainings side by side differ like
    that. The batch of a device is fitted to the machine.
    """
    rest, moved = set(changed) - LENGTH - {FOLDER}, FOLDER in changed
    if one.complete:
        return not rest or (not moved and rest <= BATCH)
    return not moved or rest <= BATCH | {WEIGHTS}
