"""Which training of a run a call of train() is: tables of what is known and what is asked."""

from __future__ import annotations

import pytest

from hf_spot.policy.changes import consequences
from hf_spot.policy.trainings import Known, Match, differences, match, steps_left

BASE = {
    "parameters": "gpt2",
    "weights": "w0",
    "output_dir": "out",
    "data": "fold-0",
    "rows": "40",
    "max_steps": "10",
    "num_train_epochs": "3.0",
    "learning_rate": "0.01",
    "per_device_train_batch_size": "4",
    "trainer.alpha": "1",
}


def described(**changes: str) -> dict[str, str]:
    return BASE | changes


def known(number: int = 1, *, complete: bool = False, at_work: bool = False, done: bool = False, **changes: str) -> Known:
    return Known(number, described(**changes), complete=complete, at_work=at_work, done_here=done)


NEW = None
CASES: dict[str, tuple[dict[str, str], list[Known], int | None]] = {
    "the first of a run": ({}, [], NEW),
    "the same": ({}, [known()], 1),
    "the same, complete": ({}, [known(complete=True)], 1),
    "the second of two": ({"data": "fold-1"}, [known(complete=True), known(2, data="fold-1")], 2),
    "the first of two, although the second is not complete": ({}, [known(complete=True), known(2, data="fold-1")], 1),
    "the next fold after one that is left out": ({"data": "fold-1"}, [known(complete=True)], NEW),
    "the next fold after one that was resumed": (
        {"data": "fold-2"},
        [known(complete=True), known(2, data="fold-1", complete=True, done=True)],
        NEW,
    ),
    "twice the same in one process": ({}, [known(complete=True, done=True)], NEW),
    "twice the same, resumed in the second": ({}, [known(complete=True, done=True), known(2)], 2),
    "further from the trained weights": ({"weights": "w1"}, [known(complete=True, done=True)], NEW),
    "another value of a sweep": ({"learning_rate": "0.02"}, [known(complete=True)], NEW),
    "another value of the script's own": ({"trainer.alpha": "2"}, [known(complete=True)], NEW),
    "another initial model": ({"weights": "w1"}, [known(complete=True)], NEW),
    "longer": ({"max_steps": "20"}, [known(complete=True)], 1),
    "longer, in another folder": ({"max_steps": "20", "output_dir": "b"}, [known(complete=True)], 1),
    "more epochs": ({"num_train_epochs": "4.0"}, [known(complete=True)], 1),
    "moved, complete": ({"output_dir": "b"}, [known(complete=True)], 1),
    "moved": ({"output_dir": "b"}, [known()], 1),
    "moved, with an unseeded layer": ({"output_dir": "b", "weights": "w1"}, [known()], 1),
    "moved to another kind of machine": ({"output_dir": "b", "per_device_train_batch_size": "2"}, [known()], 1),
    "on another kind of machine, complete": ({"per_device_train_batch_size": "2"}, [known(complete=True)], 1),
    "a changed learning rate": ({"learning_rate": "0.02"}, [known()], 1),
    "changed data": ({"data": "more", "rows": "50"}, [known()], 1),
    "side by side, in folders of their own": ({"output_dir": "b", "data": "fold-1"}, [known()], NEW),
    "side by side in this launch": ({"data": "fold-1"}, [known(at_work=True)], NEW),
    "started again in this launch": ({}, [known(at_work=True)], 1),
    "another model": ({"parameters": "lora"}, [known()], NEW),
    "the nearest of several": (
        {"max_steps": "20"},
        [known(complete=True), known(2, data="fold-1"), known(3, data="fold-2", learning_rate="0.02")],
        1,
    ),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_training_is_known_by_what_it_trains(case: str) -> None:
    changes, trainings, expected = CASES[case]
    found = match(described(**changes), trainings, before=sum(one.done_here for one in trainings))
    assert (found.known.number if found.known else NEW) == expected
    assert found.number == (expected or max((one.number for one in trainings), default=0) + 1)
    if found.known is not None and found.known.description is not None:
        assert set(found.differences) == set(changes) - (
            {"data"} if changes.get("data") == found.known.description["data"] else set()
        )


def test_a_new_training_names_what_it_resembles_and_how_it_differs() -> None:
    similar = known(2, complete=True)
    found = match(described(data="fold-1"), [known(1, complete=True, data="a", rows="7"), similar], before=0)
    assert found == Match(3, None, ("data",), similar)


def test_trainings_that_nobody_described_are_told_apart_by_their_order() -> None:
    old = [Known(1, None, complete=True, done_here=True), Known(2, None)]
    assert match(described(), old, before=1).number == 2
    assert match(described(), [Known(1, None)], before=0).known is not None
    assert match(described(), [Known(1, None), known(2)], before=0).number == 2


def test_a_notebook_cell_that_is_run_again_is_the_same_training_whatever_it_has_trained_meanwhile() -> None:
    again = Known(1, described(), complete=True, done_here=True, repeated=True)
    assert match(described(weights="trained"), [again], before=1).known == again
    assert match(described(data="others"), [again], before=1).known is None


def test_what_only_one_of_two_versions_knows_or_could_not_be_looked_at_is_no_difference() -> None:
    assert differences({"a": "1", "old": "1", "weights": None}, {"a": "2", "new": "1", "weights": "w"}) == ("a",)


@pytest.mark.parametrize(
    ("before", "now", "left"),
    [
        ({"max_steps": "10"}, {"max_steps": "20"}, True),
        ({"max_steps": "20"}, {"max_steps": "10"}, False),
        ({"max_steps": "20"}, {"max_steps": "5"}, False),
        ({"max_steps": "-1", "num_train_epochs": "1.0"}, {"max_steps": "-1", "num_train_epochs": "2.0"}, True),
        ({"max_steps": "-1", "num_train_epochs": "3.0"}, {"max_steps": "-1", "num_train_epochs": "1.0"}, False),
        ({"max_steps": "10", "num_train_epochs": "3.0"}, {"max_steps": "-1", "num_train_epochs": "3.0"}, None),
        ({}, {"max_steps": "11"}, True),
    ],
)
def test_a_new_length_leaves_steps_or_not(before: dict[str, str], now: dict[str, str], left: bool | None) -> None:
    assert steps_left(before, now, step=10, max_steps=10) is left


def test_each_change_is_a_line_with_what_follows() -> None:
    now = described(learning_rate="0.02", max_steps="20", data="more", rows="50", weights="w1", output_dir="b")
    told = consequences(BASE, now | {"trainer.alpha": "2"}, differences(BASE, now | {"trainer.alpha": "2"}), 7)
    assert told == [
        "the training data had 40 rows and have 50: the data order is that of the new data: some samples may come twice, some "
        "not at all",
        "max_steps was 10 and is 20: the schedule from step 8 on is the one for the new length",
        "learning_rate was 0.01 and is 0.02: the old value stays: it is restored with the optimizer and the scheduler",
        "trainer.alpha was 1 and is 2: the new value holds from step 8 on",
    ]
