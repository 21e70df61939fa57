"""Which id a tracker run gets, which variables name it, and which lines it has."""

from __future__ import annotations

import pytest

from hf_spot.policy.trackers import (
    COMET,
    MLFLOW,
    SWANLAB,
    TRACKERS,
    TRACKIO,
    WANDB,
    Standing,
    Told,
    Tracker,
    init_kwargs,
    is_told,
    of_callback,
    script_run_id,
    tracker_id,
    variables,
)
from tests.trackers.__main__ import CASES
from tests.trackers.read import READERS


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
    assert "tensorboard" not in init_kwargs("x", None)
    assert init_kwargs("x", None, 20)["tensorboard"] == {"purge_step": 21}
    assert init_kwargs("x", None, 20)["dvclive"] == {"resume": True}


def test_a_run_that_a_script_begins_is_another_one_for_each_name_and_number() -> None:
    ids = {script_run_id(run, name, number) for run in ("a", "b") for name in ("x", "y") for number in (1, 2)}
    assert len(ids) == 8
    assert script_run_id("a", "x", 1) == script_run_id("a", "x", 1)


def test_the_tracker_that_extends_another_is_found_first() -> None:
    found = of_callback(["DagsHubCallback", "MLflowCallback", "TrainerCallback"])
    assert found is not None and found.key == "dagshub"
    assert of_callback(["TrainerCallback"]) is None


def test_what_is_said_to_be_tested_is() -> None:
    of_command = {name for case in CASES for name in case.trackers}
    assert {tracker.key for tracker in TRACKERS if tracker.standing is Standing.TESTED} <= of_command
    assert READERS.keys() >= of_command


def test_what_can_not_be_continued_is_said() -> None:
    for tracker in TRACKERS:
        assert bool(tracker.named) == (tracker.standing is Standing.NOT), tracker.key
