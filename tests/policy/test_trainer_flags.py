"""The flags that Trainer gets, as a table: moment, decision, state, flags."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from hf_spot.policy.preemption import Action, Decision
from hf_spot.policy.trainer_flags import SAVE_IS_DUE, Flags, LoopState, Moment, flags_for, is_complete, reason_of_save

SUBSTEP, STEP, CUT, END = Moment.SUBSTEP_END, Moment.STEP_END, Moment.EVALUATION_CUT, Moment.EPOCH_END
SAVE = Decision(Action.SAVE_AND_STOP, "60 s left")
FINISH = Decision(Action.FINISH_UPLOAD_AND_STOP, "2 s left")
ADVISORY = Decision(Action.SAVE_AND_GO_ON, "the machine may be taken away")
MIDDLE = LoopState(step=7, max_steps=12, saved_step=6)

TABLE: list[tuple[str, Moment, Decision | None, LoopState, Flags]] = [
    ("nothing to answer", STEP, None, MIDDLE, Flags()),
    ("a notice that was taken back", STEP, Decision(Action.GO_ON, "cancelled"), MIDDLE, Flags()),
    # -- a notice after a step
    (
        "there is time for a save",
        STEP,
        SAVE,
        MIDDLE,
        Flags(should_save=True, should_evaluate=False, should_training_stop=True),
    ),
    (
        "there is none",
        STEP,
        FINISH,
        MIDDLE,
        Flags(should_save=False, should_evaluate=False, should_training_stop=True),
    ),
    (
        "an evaluation was next: the next launch makes it",
        STEP,
        SAVE,
        replace(MIDDLE, should_evaluate=True),
        Flags(should_save=True, should_evaluate=False, should_training_stop=True, skips_evaluation=True),
    ),
    (
        "Trainer wanted a save for which there is no time",
        STEP,
        FINISH,
        replace(MIDDLE, should_save=True),
        Flags(should_save=False, should_evaluate=False, should_training_stop=True),
    ),
    # -- a notice within a step
    (
        "the step before is not saved yet: it is, when Trainer has left its loop",
        SUBSTEP,
        SAVE,
        MIDDLE,
        Flags(should_save=True, should_training_stop=True, owes_save=True),
    ),
    (
        "the step before is saved",
        SUBSTEP,
        SAVE,
        replace(MIDDLE, saved_step=7),
        Flags(should_save=True, should_training_stop=True),
    ),
    ("no step is done", SUBSTEP, SAVE, LoopState(0, 12), Flags(should_save=True, should_training_stop=True)),
    ("there is no time for a save", SUBSTEP, FINISH, MIDDLE, Flags(should_save=False, should_training_stop=True)),
    # -- a notice within an evaluation
    ("it ends", CUT, SAVE, MIDDLE, Flags(should_save=True, should_training_stop=True, skips_evaluation=True)),
    (
        "its step is committed, with the evaluation pending",
        CUT,
        SAVE,
        replace(MIDDLE, saved_step=7),
        Flags(should_save=False, should_training_stop=True, skips_evaluation=True),
    ),
    # -- saves that are added
    ("a save is due", STEP, SAVE_IS_DUE, MIDDLE, Flags(should_save=True, added="cadence")),
    ("Trainer saves anyway", STEP, SAVE_IS_DUE, replace(MIDDLE, should_save=True), Flags()),
    ("it is the last step", STEP, SAVE_IS_DUE, replace(MIDDLE, step=12), Flags()),
    (
        "Trainer might take this step for the best, and would not have it",
        STEP,
        SAVE_IS_DUE,
        replace(MIDDLE, loads_best_model=True, should_evaluate=True),
        Flags(),
    ),
    (
        "an evaluation alone does not put it off",
        STEP,
        SAVE_IS_DUE,
        replace(MIDDLE, should_evaluate=True),
        Flags(should_save=True, added="cadence"),
    ),
    ("an advisory", STEP, ADVISORY, MIDDLE, Flags(should_save=True, added="advisory")),
    (
        "an advisory does not wait",
        STEP,
        ADVISORY,
        replace(MIDDLE, step=12, should_save=True),
        Flags(should_save=True, added="advisory"),
    ),
    (
        "an advisory at the end of an epoch that Trainer saves",
        STEP,
        ADVISORY,
        replace(MIDDLE, is_epoch_end=True, saves_each_epoch=True),
        Flags(),
    ),
    (
        "at the end of an epoch that Trainer does not save",
        STEP,
        SAVE_IS_DUE,
        replace(MIDDLE, is_epoch_end=True),
        Flags(should_save=True, added="cadence"),
    ),
    # -- behind the loop
    ("an epoch ends", END, None, MIDDLE, Flags()),
    ("Trainer saves at its end", END, None, replace(MIDDLE, should_save=True), Flags()),
    ("... a step that is saved", END, None, replace(MIDDLE, saved_step=7, should_save=True), Flags(should_save=False)),
    ("the training ends", END, None, replace(MIDDLE, should_training_stop=True), Flags(should_save=True)),
    ("... with its step saved", END, None, replace(MIDDLE, saved_step=7, should_training_stop=True), Flags()),
    (
        "it ends for a notice",
        END,
        None,
        replace(MIDDLE, stopping=True, should_training_stop=True, should_save=True),
        Flags(should_save=False, should_evaluate=False, should_log=False, forgets_best=True),
    ),
    (
        "it ends for a notice within a step",
        END,
        None,
        replace(MIDDLE, stopping=True, should_training_stop=True, save_is_owed=True),
        Flags(should_save=True, should_evaluate=False, should_log=False, forgets_best=True),
    ),
]


@pytest.mark.parametrize(("moment", "decision", "state", "flags"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_the_flags_follow_from_moment_decision_and_state(
    moment: Moment, decision: Decision | None, state: LoopState, flags: Flags
) -> None:
    assert flags_for(moment, decision, state) == flags


@pytest.mark.parametrize("moment", [SUBSTEP, STEP, CUT])
def test_a_decision_to_stop_stops_and_no_other_does(moment: Moment) -> None:
    for save, evaluate, saved in itertools.product((False, True), (False, True), (-1, 6, 7)):
        state = replace(MIDDLE, should_save=save, should_evaluate=evaluate, saved_step=saved)
        for decision in (SAVE, FINISH):
            flags = flags_for(moment, decision, state)
            assert flags.should_training_stop
            assert not flags.should_save or decision is SAVE
        for decision in (None, ADVISORY, SAVE_IS_DUE):
            assert flags_for(moment, decision, state).should_training_stop is None


@pytest.mark.parametrize(
    ("state", "added", "complete", "reason"),
    [
        (MIDDLE, None, False, "schedule"),
        (MIDDLE, "cadence", False, "cadence"),
        (replace(MIDDLE, step=12), None, True, "end"),
        (replace(MIDDLE, should_training_stop=True), None, True, "end"),
        (replace(MIDDLE, should_training_stop=True, stopping=True), None, False, "notice"),
        (replace(MIDDLE, step=12, stopping=True), "advisory", True, "notice"),
    ],
)
def test_a_commit_records_why_it_was_saved_and_whether_it_is_the_last(
    state: LoopState, added: str | None, complete: bool, reason: str
) -> None:
    assert (is_complete(state), reason_of_save(state, added)) == (complete, reason)
