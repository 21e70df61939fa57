"""What follows from a setting that has changed between two launches of a training. Pure.

Trainer restores the optimizer and the scheduler with the values that they were saved with, and takes everything else from the
script: https://pytorch.org/docs/stable/generated/torch.optim.Optimizer.load_state_dict.html and
https://pytorch.org/docs/stable/generated/torch.optim.lr_scheduler.LambdaLR.html (its functions are not saved).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from hf_spot.policy.trainings import BATCH, FOLDER, LENGTH, OF_MODEL, WEIGHTS, Description

_SAVED_WITH_OPTIMIZER = frozenset({"weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"})
_SCHEDULE = frozenset({"lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"})
_PRECISION = frozenset({"dtype", "bf16", "fp16", "tf32"})
# Said elsewhere (the batch, when it is fitted), or without a consequence: initial weights, which the checkpoint replaces.
_SILENT = frozenset({WEIGHTS, FOLDER}) | BATCH


_KEEP_BATCHES = (
    LENGTH | _SAVED_WITH_OPTIMIZER | _SCHEDULE | _PRECISION | {WEIGHTS, FOLDER, "learning_rate", "max_grad_norm", "optim"}
)


def changes_schedule(changed: Collection[str]) -> bool:
    """Return whether the schedule is another one after these changes, so that its state can't be the one that was saved."""
    return not _SCHEDULE.isdisjoint(changed)


def may_change_batches(changed: Collection[str]) -> bool:
    """Return whether the next batch may be another one after these changes: of most settings that can't be told."""
    return not _KEEP_BATCHES.issuperset(name for name in changed if not name.startswith(OF_MODEL))


def consequences(
    before: Description, now: Description, changed: Iterable[str], step: int, *, left: bool | None = None
) -> list[str]:
    """Return one line for each change: what it was, what it is, and what follows.

    Args:
        before: what the training was when the checkpoint was saved.
        now: what it is.
        changed: names of the values that differ.
        step: step of the checkpoint.
        left: whether there are steps left to train with the new length; None if it is the old one, or can't be told.
    """
    names = [name for name in changed if name not in _SILENT]
    if "rows" in names and "data" in names:
        names.remove("data")
    return [f"{_changed(name, before, now)}: {_follows(name, step, left)}" for name in names]


def _changed(name: str, before: Description, now: Description) -> str:
    if name == "data":
        return "the training data have changed"
    if name == "rows":
        return f"the training data had {before[name]} rows and have {now[name]}"
    if name.endswith("."):
        return f"the arguments of the {'data collator' if name == 'collator.' else 'loss function'} have changed"
    return f"{name} was {before[name]} and is {now[name]}"


def _follows(name: str, step: int, left: bool | None) -> str:
    if name in LENGTH and left is False:
        return "nothing is left to train, and the model is the one of that step"
    if name in LENGTH:
        return f"the schedule from step {step + 1} on is the one for the new length"
    if name == "learning_rate":
        return "the old value stays: it is restored with the optimizer and the scheduler"
    if name in _SAVED_WITH_OPTIMIZER:
        return "the old value stays: it is restored with the optimizer"
    if name in _SCHEDULE:
        return f"the new schedule holds from step {step + 1} on, as if it had always held"
    if name in ("seed", "data_seed"):
        return "the rest of the data comes in another order: some samples come twice, some not at all"
    if name in ("rows", "data"):
        return "the data order is that of the new data: some samples may come twice, some not at all"
    if name in _PRECISION:
        return f"steps from {step + 1} on are computed in the new precision"
    if name == "optim":
        return "the new optimizer continues with the state of the old one"
    return f"the new value holds from step {step + 1} on"
