"""Prices, bill and weather of the local spot cloud."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from tests.spotcloud.market import DOLLARS_PER_HOUR, ON_DEMAND, RECLAIMED, Bill, Market, Pool, weather

NOON = datetime(2030, 1, 1, 12, tzinfo=timezone.utc)
POOL = Pool("p4d.24xlarge", "us-east-1a")
FULL_PRICE = Pool("p4d.24xlarge", "us-east-1a", ON_DEMAND)


def after(hours: float) -> datetime:
    return NOON + timedelta(hours=hours)


@pytest.fixture
def market() -> Market:
    made = Market(NOON)
    made.set_price(POOL, 10.0, NOON)
    return made


def test_the_last_word_on_a_pool_holds(market: Market) -> None:
    market.close()
    market.open("p4d.*", "us-east-1?")
    market.close(zone="us-east-1b")
    assert market.has_capacity(POOL)
    assert not market.has_capacity(Pool("p4d.24xlarge", "us-east-1b"))
    assert not market.has_capacity(Pool("g5.xlarge", "us-east-1a"))


def test_a_spot_price_that_nobody_set_is_a_part_of_the_full_price_and_the_same_each_time() -> None:
    prices = [Market(NOON, seed=3).price(POOL, NOON) for _ in range(2)]
    assert prices[0] == prices[1] != Market(NOON, seed=4).price(POOL, NOON)
    assert 0.2 < prices[0] / DOLLARS_PER_HOUR["p4d.24xlarge"] < 0.5
    assert Market(NOON).price(FULL_PRICE, NOON) == pytest.approx(DOLLARS_PER_HOUR["p4d.24xlarge"], abs=1e-4)


def test_each_second_costs_what_its_hour_cost_when_it_began(market: Market) -> None:
    market.set_price(POOL, 20.0, after(1))
    market.set_price(POOL, 40.0, after(3))
    assert market.cost(POOL, after(0.5), after(3.25)) == pytest.approx(1 * 10 + 1.75 * 20)
    assert market.cost(POOL, after(0.5), after(3.75)) == pytest.approx(1 * 10 + 2 * 20 + 0.25 * 40)
    assert market.cost(POOL, after(1), after(3.25)) == pytest.approx(2 * 20 + 0.25 * 40)
    assert market.price(POOL, after(0.9)) == 10.0
    assert market.price(POOL, after(1)) == 20.0


def test_less_than_a_minute_costs_a_minute(market: Market) -> None:
    assert market.cost(POOL, NOON, NOON + timedelta(seconds=1)) == pytest.approx(10 / 60)


@pytest.mark.parametrize(
    ("reason", "hours", "free"),
    [
        (RECLAIMED, 0.9, True),
        (RECLAIMED, 1.1, False),
        ("Client.UserInitiatedShutdown", 0.9, False),
        ("Client.InstanceInitiatedShutdown", 0.9, False),
    ],
)
def test_only_what_ec2_takes_back_within_an_hour_is_free(market: Market, reason: str, hours: float, free: bool) -> None:
    bill = Bill(market)
    bill.began("i-1", POOL, NOON)
    bill.ended("i-1", after(hours), reason)
    bill.ended("i-1", after(9), "a second end changes nothing")
    assert bill.charged(after(10)) == pytest.approx(0 if free else hours * 10)
    assert ("free" in next(bill.lines(after(10)))) == free


def test_a_machine_that_runs_is_billed_until_now(market: Market) -> None:
    bill = Bill(market)
    bill.began("i-1", POOL, NOON)
    assert bill.charged(after(2)) == pytest.approx(20)


def test_a_seed_gives_its_weather_and_no_other() -> None:
    pools = [POOL, FULL_PRICE, Pool("g5.xlarge", "us-west-2b")]
    settings = {"lasts_s": 86400.0, "up_s": 7200.0, "down_s": 1800.0, "price_s": 3600.0}
    one, same, other = (weather(seed, pools, **settings) for seed in (1, 1, 2))
    assert one == same != other
    assert [change.at_s for change in one] == sorted(change.at_s for change in one)
    for pool in pools:
        turns = [change.kind for change in one if change.pool == pool and change.kind != "price"]
        gone = "close" if pool.market == ON_DEMAND else "reclaim"
        assert turns == [gone if place % 2 == 0 else "open" for place in range(len(turns))]
    reclaims = [change for seed in range(20) for change in weather(seed, pools, **settings) if change.kind == "reclaim"]
    assert {change.notice_s for change in reclaims} == {None, 120.0}
    assert not [change for change in one if change.kind == "price" and change.pool == FULL_PRICE]
    assert len([change for change in one if change.kind == "price" and change.pool == POOL]) == 24
