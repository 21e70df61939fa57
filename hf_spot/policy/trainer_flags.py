"""Which flags of `TrainerControl` the callback sets. Pure: takes (moment, decision, state), returns flags."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from hf_spot.policy.cadence import ADDED
from hf_spot.policy.preemption import Action, Decision

SAVE_IS_DUE = Decision(Action.SAVE_AND_GO_ON, "a save is due")


class Moment(Enum):
    """The point in Trainer's loop at which flags are set."""

    SUBSTEP_END = "between two micro-batches of a step"
    STEP_END = "after an optimizer step"
    EVALUATION_CUT = "after a notice has ended an evaluation early"
    EPOCH_END = "after the last step of an epoch, and after Trainer has left its loop for any reason"


@dataclass(frozen=True)
class LoopState:
    """The state of Trainer's loop at that moment.

    Args:
        step: number of optimizer steps done.
        max_steps: number of optimizer steps of the whole training.
        saved_step: step of the newest save in this launch, or the step resumed from; -1 for none.
        should_save: set by Trainer's own strategies, like the next two.
        should_evaluate: Trainer evaluates next.
        should_training_stop: Trainer leaves its loop.
        is_epoch_end: the step was the last one of an epoch.
        saves_each_epoch: ``save_strategy="epoch"``.
        loads_best_model: ``load_best_model_at_end``.
        stopping: an earlier decision ends the training for a notice.
        save_is_owed: the training stops within a step, and the step before it has not been saved.
        end_is_wanted: the script, or its last step, ends the training, whether a notice does so, too, or not.
    """

    step: int
    max_steps: int
    saved_step: int = -1
    should_save: bool = False
    should_evaluate: bool = False
    should_training_stop: bool = False
    is_epoch_end: bool = False
    saves_each_epoch: bool = False
    loads_best_model: bool = False
    stopping: bool = False
    save_is_owed: bool = False
    end_is_wanted: bool = False


@dataclass(frozen=True)
class Flags:
    """The flags to set; None leaves a flag of `TrainerControl` unchanged.

    Args:
        added: why a save is added to Trainer's own: ``cadence`` or ``advisory``.
        skips_evaluation: the next launch makes up for an evaluation that an uninterrupted run makes here.
        owes_save: the save has to wait for the end of the loop.
        forgets_best: Trainer must not load the best model at its end, nor delete the newest checkpoint in favour of it.
    """

    should_save: bool | None = None
    should_evaluate: bool | None = None
    should_log: bool | None = None
    should_training_stop: bool | None = None
    added: str | None = None
    skips_evaluation: bool = False
    owes_save: bool = False
    forgets_best: bool = False


def flags_for(moment: Moment, decision: Decision | None, state: LoopState) -> Flags:
    """Return the flags that the callback sets at a moment.

    Args:
        moment: the point in Trainer's loop.
        decision: the decision about a notice or a due save; None if there is neither.
        state: state of the loop.
    """
    if moment is Moment.EPOCH_END:
        return _at_epoch_end(state)
    if decision is None or decision.action is Action.GO_ON:
        return Flags()
    if decision.action is Action.SAVE_AND_GO_ON:
        return _with_added_save(decision, state)
    saves = decision.action is Action.SAVE_AND_STOP
    if moment is Moment.SUBSTEP_END:
        # Trainer leaves its loop and saves only after `on_epoch_end`.
        owes_save = saves and state.step not in (0, state.saved_step)
        return Flags(should_save=saves, should_training_stop=True, owes_save=owes_save)
    if moment is Moment.EVALUATION_CUT:
        saves = saves and state.saved_step != state.step  # otherwise it is already saved, with the evaluation pending
        return Flags(should_save=saves, should_training_stop=True, skips_evaluation=True)
    return Flags(
        should_save=saves,
        should_evaluate=False,
        should_training_stop=True,
        skips_evaluation=state.should_evaluate,
    )


def _with_added_save(decision: Decision, state: LoopState) -> Flags:
    due = decision == SAVE_IS_DUE
    if state.saves_each_epoch and state.is_epoch_end:
        return Flags()  # Trainer saves after its evaluation, and that checkpoint includes it
    # A due save can wait for a later step if Trainer saves this one itself, or if Trainer may choose a checkpoint of this step
    # as the best: without the added save there would be no such checkpoint to load at the end.
    can_wait = state.should_save or (state.loads_best_model and state.should_evaluate) or state.step >= state.max_steps
    if due and can_wait:
        return Flags()
    return Flags(should_save=True, added=ADDED if due else "advisory")


def _at_epoch_end(state: LoopState) -> Flags:
    if state.stopping:
        # Trainer would load the best model at its end, and with save_total_limit=1 delete the checkpoint just written.
        return Flags(should_save=state.save_is_owed, should_evaluate=False, should_log=False, forgets_best=True)
    if state.should_save and state.saved_step == state.step:
        return Flags(should_save=False)  # a second save would rewrite a folder that is being uploaded
    if state.should_training_stop and state.saved_step != state.step:
        return Flags(should_save=True)  # with any strategy, a finished run ends with its last step committed
    return Flags()


def is_complete(state: LoopState) -> bool:
    """Return whether a save is the last one of its training: all steps are done, or it would end without a notice, too."""
    return state.step >= state.max_steps or state.end_is_wanted or (state.should_training_stop and not state.stopping)


def reason_of_save(state: LoopState, added: str | None) -> str:
    """Return the reason of a save, as recorded in the commit.

    Args:
        state: state of the loop at the save.
        added: as in `Flags`.
    """
    if state.stopping:
        return "notice"
    return added or ("end" if is_complete(state) else "schedule")
