"""Numbers with their nouns."""

from __future__ import annotations

import pytest

from hf_spot.policy.words import counted


@pytest.mark.parametrize(
    ("count", "noun", "words"),
    [
        (0, "step", "0 steps"),
        (1, "step", "1 step"),
        (2, "step", "2 steps"),
        (1, "launch", "1 launch"),
        (0, "launch", "0 launches"),
        (3, "older launch", "3 older launches"),
    ],
)
def test_a_noun_is_plural_but_for_one(count: int, noun: str, words: str) -> None:
    assert counted(count, noun) == words
