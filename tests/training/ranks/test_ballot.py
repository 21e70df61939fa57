"""Ballots survive their way through numbers, and are merged by the largest of each."""

from __future__ import annotations

from dataclasses import fields

from hypothesis import given
from hypothesis import strategies as st

from hf_spot.training.ranks.ballot import VALUES, Ballot

FLAGS = [field.name for field in fields(Ballot) if field.name != "seconds_left"]
BALLOTS = st.builds(
    Ballot,
    **{name: st.booleans() for name in FLAGS},
    seconds_left=st.none() | st.floats(-1e6, 1e9, allow_nan=False),
)


@given(BALLOTS)
def test_a_ballot_comes_back_as_it_went(ballot: Ballot) -> None:
    assert len(ballot.to_values()) == VALUES
    assert Ballot.from_values(ballot.to_values()) == ballot


@given(st.lists(BALLOTS, min_size=1, max_size=5))
def test_merged_it_says_what_any_rank_says_and_the_soonest_deadline(ballots: list[Ballot]) -> None:
    merged = Ballot.from_values(list(map(max, zip(*(ballot.to_values() for ballot in ballots), strict=True))))
    for name in FLAGS:
        assert getattr(merged, name) == any(getattr(ballot, name) for ballot in ballots)
    deadlines = [ballot.seconds_left for ballot in ballots if ballot.seconds_left is not None]
    assert merged.seconds_left == min(deadlines, default=None)
