"""Where a training resumes in its pass over the data, and which events its callbacks got before."""

from __future__ import annotations

from typing import Any

import pytest

from hf_spot.policy.passes import Began, Place, place_of

SECOND = {"epoch": 1.0, "global_step": 6}
IN_SECOND = Began(SECOND)


@pytest.mark.parametrize(
    ("began", "epoch", "step", "has_length", "expected"),
    [
        pytest.param(IN_SECOND, 1.5, 9, True, Place(1, True, True, shown=SECOND), id="in the middle of a pass"),
        pytest.param(IN_SECOND, 2.0, 12, True, Place(2, False, False, owes_end=True), id="at the last step of a pass"),
        pytest.param(
            Began(SECOND, end_was_told=True, is_over=True), 2.0, 12, True, Place(2, False, False), id="after the end of a pass"
        ),
        pytest.param(IN_SECOND, 1.0, 6, True, Place(1, False, True, shown=SECOND), id="within the first step of a pass"),
        pytest.param(IN_SECOND, 1.5, 9, False, Place(1, True, True, shown=SECOND), id="in a stream"),
        pytest.param(
            Began({"epoch": 0, "global_step": 0}, end_was_told=True, is_over=True),
            0.5,
            6,
            False,
            Place(1, False, False),
            id="after the end of a stream",
        ),
        pytest.param(
            Began({"epoch": 0, "global_step": 0}, end_was_told=True),
            0.5,
            6,
            False,
            Place(0, True, True, shown={"epoch": 0, "global_step": 0}),
            id="in a stream that a finished training had not read to its end, and that is trained longer",
        ),
        pytest.param(None, 1.5, 9, True, Place(1, True, True, shown={"epoch": 1}), id="from an older version"),
        pytest.param(None, 2.0, 12, True, Place(2, False, False), id="from an older version, between passes"),
        pytest.param(None, 0.5, 6, False, Place(0, True, True), id="from an older version, in a stream"),
    ],
)
def test_where_a_training_resumes(began: Any, epoch: float, step: int, has_length: bool, expected: Place) -> None:
    assert place_of(began and began.to_details(), epoch, step, has_length=has_length) == expected
