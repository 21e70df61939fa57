"""How many machines a training has, decided by what is there, what it costs and what is left."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from hf_spot.policy.fleet import SPARE_S, WAITS_S, Decision, Goal, Means, Member, affordable_machines, decide
from hf_spot.policy.membership import Size

RICH = Means(1e6)


def goal(least: int, most: int, samples: int | None = None) -> Goal:
    return Goal(least, most, Size(least, most, samples=samples).of)


def spot(*prices: float) -> list[Member]:
    return [Member(f"i-{place}", usd, False) for place, usd in enumerate(prices)]


def full(usd: float, name: str = "i-full") -> Member:
    return Member(name, usd, True)


ANY_NUMBER = 840  # samples that every number up to 8 divides


@pytest.mark.parametrize(
    ("there", "order", "needed", "at_least"),
    [(0, 8, 2, 2), (1, 7, 1, 1), (2, 6, 0, 2), (3, 5, 0, 1), (4, 4, 0, 4), (7, 1, 0, 1), (8, 0, 0, 1), (9, 0, 0, 1)],
)
def test_all_are_asked_for_that_are_missing_and_no_fewer_than_make_a_difference(
    there: int, order: int, needed: int, at_least: int
) -> None:
    assert decide(goal(2, 8), spot(*[5.0] * there), RICH, 0) == Decision(order, needed, at_least)


def test_where_each_number_divides_the_samples_each_machine_makes_a_difference() -> None:
    assert decide(goal(2, 8, ANY_NUMBER), spot(5, 5, 5), RICH, 0) == Decision(5, 0, 1)


def test_machines_that_are_too_few_wait_for_others_and_then_go() -> None:
    few = spot(5, 5)
    assert decide(goal(3, 3), few, RICH, WAITS_S - 1) == Decision(1, 1, 1)
    found = decide(goal(3, 3), few, RICH, WAITS_S)
    assert found.end == ("i-0", "i-1") and found.order == 0
    assert found.why == "2 of at least 3 machines have waited for others in vain"


def test_what_costs_the_full_price_goes_once_spot_machines_are_enough() -> None:
    assert decide(goal(2, 4, ANY_NUMBER), [*spot(5), full(20)], RICH, 0).end == ()
    found = decide(goal(2, 4, ANY_NUMBER), [*spot(5, 5), full(20)], RICH, 0)
    assert found.end == ("i-full",) and "taken the place" in found.why
    assert decide(goal(3, 3), [*spot(5, 5), full(20)], RICH, 1e6) == Decision()  # with a fixed number it is needed


def test_of_machines_that_the_budget_does_not_cover_the_dearest_go_first() -> None:
    means = Means(left_usd=100, machine_hours=20)  # $5 for each hour of a machine
    assert decide(goal(1, 4, ANY_NUMBER), spot(4, 4, 4, 4), means, 0) == Decision()
    found = decide(goal(1, 4, ANY_NUMBER), spot(4, 9, 4, 7), means, 0)
    assert found.end == ("i-1",)  # without it the mean is 5
    assert found.why == "the budget lasts for $5.00 per machine and hour, and they cost $9.00"
    assert set(decide(goal(1, 4, ANY_NUMBER), spot(9, 9, 8, 4), means, 0).end) == {"i-0", "i-1", "i-2"}
    assert set(decide(goal(3, 4, ANY_NUMBER), spot(9, 9, 8, 4), means, 0).end) == {"i-0"}  # the minimum stays


def test_prices_that_are_all_alike_end_nothing_that_would_not_help() -> None:
    means = Means(left_usd=100, machine_hours=20)
    found = decide(goal(2, 4, ANY_NUMBER), spot(6, 6, 6), means, 0)
    assert len(found.end) == 1  # down to the minimum
    assert decide(goal(2, 4, ANY_NUMBER), spot(6, 6), means, 0) == Decision(
        why="the budget lasts for $5.00 per machine and hour, and those that train cost more"
    )


def test_more_are_asked_for_below_the_price_at_which_they_are_given_back() -> None:
    means = Means(left_usd=100, machine_hours=20)
    assert decide(goal(1, 3, ANY_NUMBER), spot(4), means, 0) == Decision(2, 0, 1, pytest.approx(4.5))


def test_machines_that_a_deadline_needs_stay_and_are_taken_at_any_price() -> None:
    late = Means(left_usd=100, machine_hours=20, deadline_h=7)
    assert decide(goal(1, 4, ANY_NUMBER), spot(4), late, 0).needed == 2
    assert decide(goal(1, 4, ANY_NUMBER), [*spot(4, 4), full(9)], late, 0).end == ()
    assert decide(goal(1, 4, ANY_NUMBER), [*spot(4, 4), full(9)], replace(late, deadline_h=10), 0).end == ("i-full",)


def test_a_spare_goes_when_nothing_has_become_of_it() -> None:
    assert decide(goal(2, 8), spot(5, 6, 5), RICH, SPARE_S - 1).end == ()
    found = decide(goal(2, 8), spot(5, 6, 5), RICH, SPARE_S)
    assert found.end == ("i-1",) and "only 2 of 3 machines divide" in found.why
    assert decide(goal(2, 8, ANY_NUMBER), spot(5, 6, 5), RICH, 1e6).end == ()


def test_nothing_that_is_given_back_leaves_too_few_or_makes_a_spare_of_one_that_trained() -> None:
    """And what is left is left alone, at the same prices: no machine is ended that the next look would ask for again."""
    prices = [3.0, 5.0, 8.0]
    for (least, most), samples, mix, left in product(
        [(1, 4), (2, 8), (3, 5)], [None, ANY_NUMBER], product(prices, repeat=4), [40, 100]
    ):
        aim, means = goal(least, most, samples), Means(left, 20)
        members = [*spot(*mix[:3]), full(mix[3] + 8)]
        found = decide(aim, members, means, 0)
        rest = [one for one in members if one.id not in found.end]
        if found.end:
            assert len(rest) >= least and found.order == 0
            assert aim.useful(len(rest)) == len(rest) or aim.useful(len(rest)) == aim.useful(len(members))
            after = decide(aim, rest, means, 0)
            gone = [one for one in members if one.id in found.end]
            if after.order and not after.needed and after.most_usd_per_hour is not None:
                assert min(one.usd_per_hour for one in gone) > after.most_usd_per_hour or all(one.is_on_demand for one in gone)


@pytest.mark.parametrize(
    ("usd", "running", "left", "hours", "count"),
    [
        (5, 0, 20, 1, 4),
        (5, 10, 20, 1, 2),
        (5, 20, 20, 1, 0),
        (5, 30, 20, 1, 0),
        (5, 0, 20, 2, 2),
        (5, 0, 20, 0, 1_000_000),
        (3, 0, 9, 1, 3),
    ],
)
def test_the_budget_covers_so_many(usd: float, running: float, left: float, hours: float, count: int) -> None:
    assert affordable_machines(usd, running, left, hours) == count
