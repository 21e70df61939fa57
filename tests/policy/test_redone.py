"""Steps that are done again are compared with those of before, value by value, up to the first that differs."""

from __future__ import annotations

import json
import math

import pytest

from hf_spot.policy.redone import Redone, Step, compare, in_words, is_complete, newest


def steps(
    *losses: float | None, launch: int = 1, first: int = 21, rate: float | None = 0.1, data: str | None = "a"
) -> dict[int, Step]:
    return {number: Step(launch, number, loss, rate, data) for number, loss in enumerate(losses, first)}


def words(before: dict[int, Step], again: dict[int, Step], *changed: str) -> str:
    found = compare({0: before}, {0: again}, changed)
    assert found is not None
    assert Redone.of(json.loads(json.dumps(found.to_data()))) == found  # as a journal holds it
    return in_words(found)


def test_ten_equal_steps_are_told_in_one_line() -> None:
    before, again = steps(*[math.pi] * 10), steps(*[math.pi] * 10, launch=2)
    assert words(before, again) == "10 steps redone, all equal"
    assert is_complete(compare({0: before}, {0: again}), {0: before})


def test_the_first_difference_is_told_with_its_size_and_with_what_is_equal() -> None:
    before, again = steps(2.5, 2.3451, 1.0), steps(2.5, 2.3449, 7.0, launch=2)
    assert words(before, again) == (
        "1 step redone equal, then step 22 differs: loss 2.3451 before, 2.3449 now (a relative difference of 8.5e-05); "
        "learning rate and data equal"
    )
    assert is_complete(compare({0: before}, {0: again}), {0: before})


def test_the_smallest_difference_of_two_floats_is_visible() -> None:
    line = words(steps(1.0), steps(math.nextafter(1.0, 2)))
    assert "loss 1 before, 1.0000000000000002 now (a relative difference of 2.2e-16)" in line


def test_other_samples_are_told_as_data_beside_the_loss_that_follows_from_them() -> None:
    line = words(steps(2.0), steps(3.0, data="b"))
    assert line.startswith("step 21 differs: loss 2 before, 3 now")
    assert line.endswith("data: other samples, or in another order; learning rate equal")


def test_a_change_that_was_wanted_makes_a_difference_no_surprise() -> None:
    line = words(steps(2.0), steps(2.0, rate=0.2), "learning_rate was 0.1 and is 0.2")
    assert "learning rate 0.1 before, 0.2 now" in line
    assert line.endswith("(to be expected: learning_rate was 0.1 and is 0.2)")
    assert words(steps(2.0), steps(2.0), "seed was 1 and is 2") == "1 step redone, all equal"


def test_nan_equals_itself_and_differs_from_a_number() -> None:
    assert words(steps(math.nan), steps(math.nan)) == "1 step redone, all equal"
    assert "loss nan before, 1 now;" in words(steps(math.nan), steps(1.0))
    assert Step.of(json.loads(json.dumps(Step(1, 2, math.nan).to_json()))).loss != 0


@pytest.mark.parametrize(
    ("before", "again", "told"),
    [
        (steps(1.0, data=None), steps(1.0), "1 step redone, all equal (loss and learning rate compared, data unknown)"),
        (steps(1.0, None), steps(1.0, 2.0), "2 steps redone, all equal (loss of 1 compared)"),
        (steps(1.0, 2.0), steps(1.0), "1 step redone, all equal (of steps 21 to 22)"),
    ],
)
def test_equal_means_what_was_compared_and_the_rest_is_named(
    before: dict[int, Step], again: dict[int, Step], told: str
) -> None:
    assert words(before, again) == told


def test_a_step_counts_once_all_ranks_have_done_it() -> None:
    before = {0: steps(1.0, 2.0), 1: steps(3.0, 4.0)}
    found = compare(before, {0: steps(1.0, 2.0), 1: steps(3.0)})
    assert found is not None
    assert (found.steps, is_complete(found, before)) == (1, False)
    assert compare(before, {0: steps(1.0)}) is None
    found = compare(before, {0: steps(1.0, 2.0), 1: steps(3.0, 4.5)})
    assert found is not None
    assert in_words(found).startswith("1 step redone equal, then step 22 on rank 1 differs: loss 4 before, 4.5 now")


def test_each_step_is_compared_with_the_newest_launch_that_did_it() -> None:
    told = [*steps(1.0, 2.0, 3.0).values(), *steps(1.5, 2.5, launch=2).values(), *steps(9.0, launch=3).values()]
    found = newest(told, after=21, before_launch=3)
    assert [(one.step, one.loss) for one in found.values()] == [(22, 2.5), (23, 3.0)]


@pytest.mark.parametrize(
    "strange", [{}, {"first": 1}, {"first": "1", "last": 2, "steps": 1, "compared": {}, "different": None, "changed": []}]
)
def test_entries_of_another_kind_are_ignored(strange: dict[str, object]) -> None:
    assert Redone.of(strange) is None
