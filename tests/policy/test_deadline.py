"""Uniform Progress: who has to be on time pays the full price when it must, and not before."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from hf_spot.policy.deadline import Market, Progress, choose, holds_s

progresses = st.builds(
    lambda work_s, room, done, elapsed, change_s: Progress(
        work_s, done * work_s, elapsed * room * work_s, room * work_s, change_s
    ),
    st.floats(100, 1e5),
    st.floats(1.01, 5),
    st.floats(0, 0.999),  # one that is finished has nothing to decide, and its slack is rounding alone
    st.floats(0, 1),
    st.just(0.0) | st.floats(1, 1000),
)
idle = Progress(work_s=1000, done_s=0, elapsed_s=0, deadline_s=2000, change_s=50)


def test_a_spot_machine_is_taken_even_when_behind_and_kept() -> None:
    behind = replace(idle, done_s=100, elapsed_s=400)
    assert choose(behind, Market.NONE, spot=True) is Market.SPOT
    assert choose(behind, Market.SPOT, spot=True) is Market.SPOT


def test_who_is_ahead_waits_and_who_is_behind_pays() -> None:
    assert choose(replace(idle, done_s=300, elapsed_s=400), Market.NONE, spot=False) is Market.NONE
    assert choose(replace(idle, done_s=100, elapsed_s=400), Market.NONE, spot=False) is Market.ON_DEMAND


def test_an_on_demand_machine_is_kept_until_it_is_worth_a_change() -> None:
    even = replace(idle, done_s=200, elapsed_s=400)
    assert choose(even, Market.ON_DEMAND, spot=True) is Market.ON_DEMAND
    ahead = replace(even, done_s=250)  # as uniform progress will be after two changes of 50 s
    assert choose(ahead, Market.ON_DEMAND, spot=True) is Market.SPOT
    assert choose(ahead, Market.ON_DEMAND, spot=False) is Market.NONE


def test_the_safety_net_finishes_on_demand_whatever_there_is() -> None:
    late = replace(idle, done_s=500, elapsed_s=1400)
    for on in (Market.NONE, Market.ON_DEMAND):
        assert choose(late, on, spot=True) is Market.ON_DEMAND
    assert choose(late, Market.SPOT, spot=True) is Market.SPOT


@given(progresses)
@settings(max_examples=200, deadline=None)
def test_a_decision_holds_as_long_as_it_says(progress: Progress) -> None:
    for on, pace in ((Market.NONE, 0.0), (Market.ON_DEMAND, 1.0)):
        if choose(progress, on, spot=False) is not on:
            continue
        held_s = holds_s(progress, on)
        if held_s < 1e-6 * progress.deadline_s:
            continue
        for share in (0.0, 0.5, 0.999):
            at_s = held_s * share if held_s < math.inf else 1e6 * share
            later = replace(progress, elapsed_s=progress.elapsed_s + at_s, done_s=progress.done_s + pace * at_s)
            assert choose(later, on, spot=False) is on
        if on is Market.NONE:
            after = replace(progress, elapsed_s=progress.elapsed_s + held_s + 1e-6 * progress.deadline_s)
            assert choose(after, on, spot=False) is Market.ON_DEMAND


@given(
    st.floats(1.2, 4),
    st.lists(st.tuples(st.floats(1, 600), st.booleans()), min_size=1, max_size=40),
)
@settings(max_examples=100, deadline=None)
def test_no_deadline_that_leaves_room_is_missed_whatever_spot_machines_do(
    room: float, spells: list[tuple[float, bool]]
) -> None:
    work_s, change_s, tick_s = 10_000.0, 200.0, 20.0
    progress = Progress(work_s, 0.0, 0.0, room * work_s + 2 * change_s, change_s)
    on, starting_s = Market.NONE, 0.0
    states = [has for length_s, has in spells for _ in range(int(length_s / tick_s) + 1)]
    at = 0
    while progress.done_s < work_s:
        spot = states[at % len(states)]
        at += 1
        if on is Market.SPOT and not spot:
            on = Market.NONE
        chosen = choose(progress, on, spot=spot)
        if chosen is not on:
            on, starting_s = chosen, change_s
        trains = on is not Market.NONE and starting_s <= 0
        starting_s -= tick_s
        progress = replace(progress, elapsed_s=progress.elapsed_s + tick_s, done_s=progress.done_s + tick_s * trains)
        assert progress.elapsed_s <= progress.deadline_s + change_s
    assert progress.elapsed_s <= progress.deadline_s + tick_s
