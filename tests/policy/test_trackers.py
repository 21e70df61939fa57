"""Which id a tracker run gets, which variables name it, and which lines it has."""

from __future__ import annotations

import pytest

from hf_spot.policy.trackers import (
    COMET,
    MLFLOW,
    SWANLAB,
    TRACKIO,
    WANDB,
    Told,
    Tracker,
    init_kwargs,
    is_told,
    tracker_id,
    variables,
)


def test_an_id_stays_with_a_training_and_is_another_for_each() -> None:
    assert tracker_id("a", 1) == tracker_id("a", 1)
    ids = {tracker_id(run, training) for run in ("a", "b") for training in (1, 2, 11)}
    assert len(ids) == 6
    assert all(len(one) == 32 and one.isalnum() for one in ids)  # as Comet wants it


@pytest.mark.parametrize(
    ("tracker", "environ", "expected"),
    [
        (WANDB, {}, {"WANDB_RUN_ID": "x", "WANDB_RESUME": "allow"}),
        (WANDB, {"WANDB_RUN_ID": ""}, {"WANDB_RUN_ID": "x", "WANDB_RESUME": "allow"}),
        (WANDB, {"WANDB_RESUME": "must"}, {"WANDB_RUN_ID": "x"}),
        (SWANLAB, {}, {"SWANLAB_RUN_ID": "x", "SWANLAB_RESUME": "allow"}),
        (MLFLOW, {}, {"MLFLOW_RUN_ID": "x"}),
        (COMET, {}, {"COMET_EXPERIMENT_KEY": "x"}),
        (TRACKIO, {}, {}),
    ],
)
def test_the_variables_of_a_tracker(tracker: Tracker, environ: dict[str, str], expected: dict[str, str]) -> None:
    assert variables(tracker, "x", environ) == expected


def test_an_id_of_the_user_is_left_and_continued() -> None:
    assert variables(WANDB, None, {"WANDB_RUN_ID": "mine"}) == {"WANDB_RESUME": "allow"}
    assert variables(WANDB, "x", {"WANDB_RUN_ID": "mine"}) == {"WANDB_RESUME": "allow"}


# Lines 0, 1, 2 are of steps 2, 4, 4: a loss, a loss, and an evaluation.
@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (Told(0), [False, False, False]),  # a new tracker run, or one that is written offline
        (Told(1, 2), [True, False, False]),
        (Told(2, 4), [True, True, False]),  # killed between two lines of a step
        (Told(3, 4), [True, True, True]),
        (Told(30, 2), [True, False, False]),  # the script logs, too
        (Told(30, 40), [True, True, True]),
    ],
)
def test_the_lines_that_a_tracker_has(told: Told, expected: list[bool]) -> None:
    assert [is_told(number, step, told) for number, step in enumerate((2, 4, 4))] == expected


def test_what_a_custom_loop_gives_its_trackers() -> None:
    assert init_kwargs("x", None) == {
        "wandb": {"id": "x", "resume": "allow"},
        "trackio": {"name": "x", "resume": "allow"},
        "swanlab": {"id": "x", "resume": "allow"},
        "comet_ml": {"experiment_key": "x"},
    }
    assert init_kwargs("x", "5")["mlflow"] == {"run_id": "5"}
