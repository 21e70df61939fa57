from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hf_spot.policy.micro_batches import DATA, MODEL, Shares, count_in, seed_of, steps_in, turns

BATCHES, COUNTS, RANKS = st.integers(1, 60), st.integers(1, 13), st.integers(1, 9)


@given(BATCHES, COUNTS, RANKS)
def test_each_micro_batch_counts_once_and_in_its_step_on_any_number_of_ranks(batches: int, count: int, ranks: int) -> None:
    shares = Shares(count, ranks)
    every = [list(turns(range(batches), shares, rank)) for rank in range(ranks)]
    steps = steps_in(batches, count)
    assert {len(one) for one in every} == {steps * shares.each}, "ranks would wait for each other forever"
    for step in range(steps):
        in_step, first = count_in(step, batches, count), step * count
        counted = {}
        for rank, of_rank in enumerate(every):
            for turn in range(shares.each):
                found = of_rank[step * shares.each + turn]
                assert first <= found.number == found.value < first + in_step
                if (number := shares.number(rank, turn)) < in_step:
                    counted[number] = found.value
        assert counted == {number: first + number for number in range(in_step)}


@given(COUNTS, RANKS)
def test_no_more_is_computed_for_nothing_than_ranks_that_have_no_micro_batch(count: int, ranks: int) -> None:
    shares = Shares(count, ranks)
    assert 0 <= shares.dropped < ranks
    assert shares.dropped == 0 or count % ranks


def test_each_micro_batch_has_random_numbers_of_its_own() -> None:
    places = [(step, number) for step in range(20) for number in range(20)]
    seeds = {seed_of(seed, purpose, place) for seed in (0, 1, -1) for purpose in (MODEL, DATA) for place in places}
    assert len(seeds) == 3 * 2 * len(places)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(42, MODEL, (3, 1)) == seed_of(42, MODEL, (3, 1))
