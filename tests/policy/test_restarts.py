from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_spot.policy.restarts import (
    LONGEST_PAUSE_S,
    Verdict,
    exit_code,
    has_left,
    judge,
    may_restart,
    outlives_s,
    patience_s,
    pause_s,
    steps_in_words,
    waits_for_the_rest,
)


@pytest.mark.parametrize(
    ("exit_code", "ended", "fenced", "noticed", "verdict"),
    [
        (0, None, False, False, Verdict.FINISHED),
        (0, None, False, True, Verdict.FINISHED),  # it was faster than the notice
        (1, "preempted", False, True, Verdict.PREEMPTED),  # torchrun makes 1 of 75
        (0, "preempted", False, True, Verdict.PREEMPTED),  # a script that catches SystemExit
        (75, None, False, False, Verdict.PREEMPTED),
        (137, None, False, True, Verdict.PREEMPTED),
        (1, None, False, False, Verdict.FAILED),
        (1, None, True, False, Verdict.FENCED),
        (76, None, False, True, Verdict.FENCED),
    ],
)
def test_the_journal_counts_more_than_the_exit_code(
    exit_code: int, ended: str | None, fenced: bool, noticed: bool, verdict: Verdict
) -> None:
    assert judge(exit_code, ended, fenced=fenced, noticed=noticed) is verdict


@pytest.mark.parametrize(
    ("of_command", "told", "as_it_is", "code"),
    [
        (0, None, False, 0),
        (1, 7, False, 7),  # torchrun makes 1 of 7
        (0, 2, False, 2),
        (0, None, True, 0),
        (7, None, True, 7),
        (0, 2, True, 0),  # the command has dealt with the failure of a process
        (1, 2, True, 2),
        (0, 75, True, 75),  # a shell goes on to the next line
        (0, 76, True, 76),
    ],
)
def test_the_code_of_a_launch_is_that_of_its_command_or_what_a_process_of_it_told(
    of_command: int, told: int | None, as_it_is: bool, code: int
) -> None:
    assert exit_code(of_command, told, as_it_is=as_it_is) == code


def test_the_budget_counts_launches_without_progress() -> None:
    assert may_restart(1, 0, 1)  # it crashed, but committed something
    assert may_restart(1, 1, 1)
    assert not may_restart(1, 2, 1)
    assert not may_restart(1, 0, 0)
    assert not may_restart(2, 0, 5)


@given(st.integers(0, 200))
def test_pauses_grow_and_have_an_end(fruitless: int) -> None:
    assert pause_s(0) == 0.1 < pause_s(1) == 1.0
    assert pause_s(fruitless) <= pause_s(fruitless + 1) <= LONGEST_PAUSE_S


def test_patience_follows_the_deadline_and_not_a_constant() -> None:
    assert patience_s(120.0, training=True, drain_timeout_s=600) == 150.0
    assert patience_s(120.0, training=False, drain_timeout_s=600) == 120.0
    assert patience_s(-5.0, training=False, drain_timeout_s=600) == 0.0
    assert patience_s(None, training=True, drain_timeout_s=600) == 600
    assert patience_s(None, training=False, drain_timeout_s=600) == 10.0
    assert patience_s(None, training=False, drain_timeout_s=600, trained_s=45.0) == 55.0


def test_a_training_that_fails_because_another_machine_went_is_preempted() -> None:
    assert judge(1, None, fenced=False, noticed=False, lost=True) is Verdict.PREEMPTED
    assert judge(0, None, fenced=False, noticed=False, lost=True) is Verdict.FINISHED


def test_a_training_waits_for_a_machine_that_ended_well_and_not_for_one_that_is_lost() -> None:
    assert outlives_s(Verdict.LOST, 600) == 0
    assert 0 < outlives_s(Verdict.FAILED, 600) < 60
    assert outlives_s(Verdict.PREEMPTED, 600) > 600
    assert 0 < outlives_s(Verdict.PREEMPTED, 600, has_begun=False) < 60
    assert outlives_s(Verdict.FINISHED, 600, has_begun=False) > 600


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        ({}, "step 0 is committed"),
        ({1: (5, 5)}, "step 5 is committed"),
        ({3: (5, 8)}, "step 5 is committed; 3 steps after it will be redone"),
        ({1: (5, 8), 2: (6, 6)}, "step 5 of training 1, step 6 of training 2 are committed; 3 steps after them will be redone"),
        ({1: (8, 5), 2: (6, 6)}, "step 8 of training 1, step 6 of training 2 are committed"),
    ],
)
def test_what_is_redone_is_told_for_each_training(steps: dict[int, tuple[int, int]], told: str) -> None:
    assert steps_in_words(steps) == told


@pytest.mark.parametrize(
    ("other", "code", "own_code", "left"),
    [
        (Verdict.LOST, 1, None, True),
        (Verdict.FAILED, 2, None, True),
        (Verdict.FAILED, 2, 1, True),  # a rank here failed only since its neighbour did
        (Verdict.FAILED, 2, 2, False),  # the command can't be used on any machine
        (Verdict.FAILED, 1, 1, False),
        (Verdict.PREEMPTED, 75, 75, False),
    ],
)
def test_a_machine_that_is_not_started_again_is_left_behind(
    other: Verdict, code: int, own_code: int | None, left: bool
) -> None:
    assert has_left(other, code, own_code) is left


@pytest.mark.parametrize(
    ("since_s", "training", "may_train", "waits"),
    [
        (0.0, None, True, True),  # a daemon that still imports torch
        (59.9, None, True, True),
        (60.0, None, True, False),  # it is none that trains
        (0.0, None, False, False),
        (1e6, True, False, True),  # a training takes as long as it takes
        (0.0, False, True, False),  # what is left after a training is a server, such as TensorBoard
    ],
)
def test_what_a_command_has_left_behind_is_waited_for_while_it_trains_or_may_begin_to(
    since_s: float, training: bool | None, may_train: bool, waits: bool
) -> None:
    assert waits_for_the_rest(since_s, training=training, may_train=may_train) is waits
