"""Which bytes of a sharded checkpoint some ranks read: in tables, and compared with sets of numbers."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_spot.policy.shard_reads import Chunk, Stretch, Value, length, merged, parts_of, ranges_read, without

STRETCHES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)).map(lambda pair: (min(pair), max(pair) + 1)), max_size=6)


def numbers(stretches: Collection[Stretch]) -> set[int]:
    return {number for first, end in stretches for number in range(first, end)}


def sharded(rows: int, shards: int, *, at: int = 0) -> Value:
    """A tensor as FSDP divides it; each row has ten bytes, in a file of its shard."""
    each = -(-rows // shards)
    pieces = [(shard, shard * each, min((shard + 1) * each, rows)) for shard in range(shards) if shard * each < rows]
    return Value(rows, tuple(Chunk(f"__{shard}", at, 10 * (end - first), (first, end)) for shard, first, end in pieces))


EVERYBODYS = Value(0, (Chunk("__1", 500, 7, None),))
DIVIDED_OTHERWISE = Value(4, (Chunk("__0", 800, 1, None), Chunk("__1", 800, 1, None)))


@pytest.mark.parametrize(
    ("ranks", "world_size", "saved", "wanted"),
    [
        ((0,), 2, 2, {"__0": [(0, 320)], "__1": [(500, 507)]}),
        ((1,), 2, 2, {"__1": [(0, 310), (500, 507)]}),
        ((0, 1), 2, 2, {"__0": [(0, 320)], "__1": [(0, 310), (500, 507)]}),
        ((0,), 4, 2, {"__0": [(0, 320)], "__1": [(500, 507)]}),
        ((2,), 4, 2, {"__1": [(0, 310), (500, 507)]}),  # rows 32 to 47
        ((0,), 1, 2, {"__0": [(0, 320)], "__1": [(0, 310), (500, 507)]}),
        ((1,), 3, 2, {"__0": [(0, 320)], "__1": [(0, 310), (500, 507)]}),  # rows 21 to 41
        ((2,), 3, 2, {"__1": [(0, 310), (500, 507)]}),
    ],
)
def test_each_rank_reads_the_chunks_of_its_rows_and_what_everybody_reads(
    ranks: tuple[int, ...], world_size: int, saved: int, wanted: dict[str, list[Stretch]]
) -> None:
    assert ranges_read([sharded(63, 2), EVERYBODYS], ranks, world_size, saved) == wanted


def test_replicas_read_the_same_shard() -> None:
    for rank in range(4):  # HSDP: two replicas of two shards
        assert set(ranges_read([sharded(64, 2)], [rank], 4, 4)) == {f"__{rank % 2}"}


def test_a_tensor_of_fewer_rows_than_ranks_is_read_by_those_that_have_some() -> None:
    values = [sharded(64, 4), sharded(2, 4, at=900)]
    assert [len(found.get(f"__{rank}", [])) for rank in range(4) for found in [ranges_read(values, [rank], 4, 4)]] == [
        2,
        2,
        1,
        1,
    ]


def test_what_is_not_divided_by_rows_is_read_by_all() -> None:
    assert ranges_read([DIVIDED_OTHERWISE], [1], 2, 2) == {"__0": [(800, 801)], "__1": [(800, 801)]}


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 60))
def test_all_ranks_together_read_everything_and_each_what_it_needs(saved: int, world_size: int, rows: int) -> None:
    value, large = sharded(rows, saved), sharded(saved, saved, at=900)
    everything = ranges_read([value, large], range(world_size), world_size, saved)
    assert numbers([chunk.rows or (0, 0) for chunk in value.chunks if chunk.file in everything]) == set(range(rows))
    each = -(-rows // world_size)
    for rank in range(world_size):
        mine = set(range(rank * each, min((rank + 1) * each, rows)))
        read = {file for file, found in ranges_read([value, large], [rank], world_size, saved).items() if found[0][0] == 0}
        assert mine <= numbers([chunk.rows or (0, 0) for chunk in value.chunks if chunk.file in read])


@given(STRETCHES, STRETCHES)
def test_stretches_are_sets_of_numbers(one: list[Stretch], other: list[Stretch]) -> None:
    assert numbers(merged(one)) == numbers(one)
    assert length(merged(one)) == len(numbers(one))
    assert numbers(without(one, other)) == numbers(one) - numbers(other)
    assert numbers(parts_of(one, 4)) == {number // 4 for number in numbers(one)}
    for found in (merged(one), without(one, other), parts_of(one, 4)):
        assert found == sorted(found)
        assert all(end < first for (_, end), (first, _) in pairwise(found)), "those that touch are one"


def test_a_small_gap_is_taken_along() -> None:
    assert parts_of([(0, 4), (8, 12), (20, 24)], 4, gap=1) == [(0, 3), (5, 6)]
