"""Which pools are tried in which order, and what they may cost."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_spot.cloud.job import ANY, ON_DEMAND, SPOT, Rung
from hf_spot.cloud.ladder import Pool, Price, cost_usd, in_order, is_free, minutes_affordable, over_budget, pause_s, untried

NOW = datetime(2030, 1, 1, tzinfo=timezone.utc)
RUNG = Rung(("p4d.24xlarge", "g5.48xlarge"), SPOT, ANY)


def pool(usd: float | None, region: str = "us-east-1", score: int | None = None, market: str = SPOT, zone: str = "a") -> Pool:
    price = None if usd is None else Price(usd, NOW, "here")
    return Pool(region, region + zone, f"subnet-{zone}", "p4d.24xlarge", market, price, score)


def test_the_cheapest_comes_first_and_what_has_no_price_not_at_all() -> None:
    pools = [pool(9, "eu-west-1"), pool(8, zone="b"), pool(None, "us-west-2"), pool(12)]
    assert in_order(pools, RUNG, []) == [[pool(8, zone="b"), pool(12)], [pool(9, "eu-west-1")]]


def test_a_price_above_the_rungs_is_left_out() -> None:
    assert in_order([pool(9), pool(10, zone="b"), pool(10.01, zone="c")], Rung(("p4d.24xlarge",), max_price=10), []) == [
        [pool(9), pool(10, zone="b")]
    ]


@pytest.mark.parametrize(
    ("scores", "first"),
    [((9, 3), "a-a-1"), ((7, 6), "a-a-1"), ((4, 6), "b-b-1"), ((8, 9), "b-b-1"), ((None, 3), "a-a-1"), ((None, 5), "b-b-1")],
)
def test_likely_regions_come_before_cheap_ones_and_small_differences_do_not_count(
    scores: tuple[int | None, int | None], first: str
) -> None:
    dear, cheap = pool(9, "a-a-1", scores[0]), pool(5, "b-b-1", scores[1])
    assert in_order([cheap, dear], RUNG, [])[0][0].region == first


def test_between_equals_the_preferred_region_comes_first() -> None:
    pools = [pool(9, "a-a-1"), pool(9, "b-b-1")]
    assert in_order(pools, RUNG, ["b-b-1", "a-a-1"])[0] == [pools[1]]


def test_only_pools_that_were_not_really_tried_are_asked_for_again() -> None:
    one, two, three = pool(1), pool(2, zone="b"), pool(3, zone="c")
    codes = {
        ("p4d.24xlarge", "subnet-a"): "InsufficientInstanceCapacity",
        ("p4d.24xlarge", "subnet-b"): "UnfulfillableCapacity",
    }
    assert untried([one, two, three], codes) == [two, three]
    # Nobody gave a reason of its own: the next call would hear the same.
    assert untried([two, three], codes) == []


@pytest.mark.parametrize(
    ("market", "left", "hours", "enough"),
    [
        (SPOT, 10, None, True),
        (SPOT, 9.99, None, False),
        (SPOT, 10, 20.0, True),
        (SPOT, 5, 0.5, True),
        (ON_DEMAND, 10, None, True),
        (ON_DEMAND, 199, 20.0, False),
        (ON_DEMAND, 200, 20.0, True),
        (ON_DEMAND, 0, 0.1, False),
    ],
)
def test_at_the_full_price_the_rest_of_the_training_must_be_affordable_and_on_the_spot_market_an_hour(
    market: str, left: float, hours: float | None, enough: bool
) -> None:
    said = over_budget(pool(10, market=market), left, hours)
    assert bool(said) is not enough
    assert enough or "$10.00/h" in said


def test_the_fuse_burns_at_the_dearest_price() -> None:
    assert minutes_affordable([pool(10), pool(30)], 60) == 120
    assert minutes_affordable([pool(10)], 0) == 1


def test_a_price_that_changes_is_paid_as_it_changes() -> None:
    history = [(NOW + timedelta(hours=2), 4.0), (NOW + timedelta(hours=1), 2.0), (NOW - timedelta(hours=5), 1.0)]
    assert cost_usd(NOW, NOW + timedelta(hours=3), 99.0, history) == pytest.approx(1 + 2 + 4)
    assert cost_usd(NOW, NOW + timedelta(hours=3), 5.0) == pytest.approx(15)
    assert cost_usd(NOW, NOW, 5.0, history) == 0


def test_each_hour_of_a_machine_has_the_price_at_its_beginning() -> None:
    history = [(NOW + timedelta(minutes=1), 8.0), (NOW + timedelta(minutes=59), 2.0), (NOW + timedelta(minutes=61), 50.0)]
    assert cost_usd(NOW, NOW + timedelta(minutes=45), 4.0, history) == pytest.approx(3)
    assert cost_usd(NOW, NOW + timedelta(minutes=90), 4.0, history) == pytest.approx(4 + 1)


@given(st.lists(st.tuples(st.integers(-100, 400), st.floats(0.1, 50)), max_size=8), st.integers(0, 5), st.integers(0, 300))
def test_two_parts_cost_what_the_whole_costs(changes: list[tuple[int, float]], first: int, second: int) -> None:
    history = [(NOW + timedelta(minutes=at), usd) for at, usd in changes]
    middle, end = NOW + timedelta(hours=first), NOW + timedelta(hours=first, minutes=second)
    latest = max(((at, usd) for at, usd in sorted(history, key=lambda one: one[0]) if at < middle), default=(NOW, 3.0))[1]
    whole = cost_usd(NOW, end, 3.0, history)
    if len({at for at, _ in history}) == len(history):
        assert cost_usd(NOW, middle, 3.0, history) + cost_usd(middle, end, latest, history) == pytest.approx(whole)


def test_only_a_first_hour_that_ec2_cut_short_is_free() -> None:
    reason = "Server.SpotInstanceTermination"
    assert is_free(SPOT, NOW, NOW + timedelta(minutes=59), reason)
    assert not is_free(SPOT, NOW, NOW + timedelta(minutes=60), reason)
    assert not is_free(SPOT, NOW, NOW + timedelta(minutes=59), "Client.UserInitiatedShutdown")
    assert not is_free(ON_DEMAND, NOW, NOW + timedelta(minutes=59), reason)


def test_pauses_grow_to_ten_minutes() -> None:
    assert [pause_s(count) for count in (1, 2, 5, 50)] == [60, 120, 600, 600]
