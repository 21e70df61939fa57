from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_spot.policy.cadence import (
    ASSUMED_STALL_S,
    History,
    Interruptions,
    SaveCost,
    best_interval_s,
    learn,
    next_save_s,
)

stalls = st.floats(0.01, 600)
shares = st.floats(0.001, 1)
means = st.floats(60, 1e6)
expectations = st.builds(Interruptions, means, shares)
histories = st.builds(History, st.floats(0, 1e7), st.integers(0, 500), st.integers(0, 500))
costs = st.builds(SaveCost, st.none() | stalls, st.none() | st.floats(0.01, 3600))
caps = st.floats(10, 1e5)


# -- the interval --------------------------------------------------------------------------------------------------------


@given(stall_s=stalls, expected=expectations, factor=st.floats(1.01, 10))
def test_the_interval_is_longer_where_saves_cost_more_and_interruptions_are_rarer_or_better_announced(
    stall_s: float, expected: Interruptions, factor: float
) -> None:
    mean_s, share = expected.mean_time_s, expected.unannounced_share
    here = best_interval_s(stall_s, expected)
    assert best_interval_s(stall_s, Interruptions(mean_s * factor, share)) > here
    assert best_interval_s(stall_s, Interruptions(mean_s, share / factor)) > here
    if stall_s * factor < mean_s / share / 8:  # what is lost in a stall counts as much as the stall where that is long
        assert best_interval_s(stall_s * factor, expected) > here


@given(stall_s=stalls, expected=expectations, factor=st.floats(1e-3, 1e3))
def test_the_unit_of_time_does_not_matter(stall_s: float, expected: Interruptions, factor: float) -> None:
    scaled = Interruptions(expected.mean_time_s * factor, expected.unannounced_share)
    assert best_interval_s(stall_s * factor, scaled) == pytest.approx(best_interval_s(stall_s, expected) * factor)


@given(stall_s=stalls, expected=expectations)
def test_the_interval_is_the_square_root_where_saves_are_cheap_and_never_longer_than_daly_allows(
    stall_s: float, expected: Interruptions
) -> None:
    apart_s = expected.mean_time_s / expected.unannounced_share
    plain_s = math.sqrt(2 * stall_s * apart_s)
    found = best_interval_s(stall_s, expected)
    assert 0 < found <= apart_s * 1.0001
    assert abs(found - plain_s) <= stall_s * 1.0001 or found == apart_s


def test_where_every_notice_is_usable_nothing_is_saved_for_the_others() -> None:
    assert best_interval_s(5.0, Interruptions(3600, 0.0)) == math.inf
    assert next_save_s(SaveCost(5.0), Interruptions(3600, 0.0), 1800.0) == 1800.0


def test_saves_that_cost_nothing_are_made_as_fast_as_they_can_be_uploaded() -> None:
    assert next_save_s(SaveCost(0.0, 7.0), Interruptions(3600, 0.1), 1800.0) == 7.0


def test_before_the_first_save_it_is_taken_for_a_slow_one() -> None:
    expected = Interruptions(3600, 0.1)
    assert next_save_s(SaveCost(), expected, 1e6) == best_interval_s(ASSUMED_STALL_S, expected)


@given(cost=costs, expected=expectations, cap_s=caps)
def test_uploads_do_not_queue_and_no_more_than_the_longest_interval_passes(
    cost: SaveCost, expected: Interruptions, cap_s: float
) -> None:
    found = next_save_s(cost, expected, cap_s)
    assert found >= (cost.commit_s or 0)
    assert found <= max(cap_s, cost.commit_s or 0)


@given(cost=costs, expected=expectations, cap_s=caps, scheduled_s=st.floats(1, 1e5))
def test_saves_are_added_evenly_between_those_that_are_scheduled(
    cost: SaveCost, expected: Interruptions, cap_s: float, scheduled_s: float
) -> None:
    alone = next_save_s(cost, expected, cap_s)
    found = next_save_s(cost, expected, cap_s, scheduled_s)
    assert found >= (cost.commit_s or 0)
    if found == math.inf:  # the scheduled one is the next
        assert scheduled_s <= 1.5 * alone * 1.0001 or scheduled_s < 2 * (cost.commit_s or 0) * 1.0001
    else:
        assert scheduled_s / found == pytest.approx(round(scheduled_s / found))
        assert found <= scheduled_s / 2 * 1.0001
        assert alone / 2 < found < 2 * alone
        if (cost.commit_s or 0) < cap_s / 2:
            assert found <= cap_s * 1.0001


def test_a_schedule_that_is_fast_enough_is_left_alone() -> None:
    expected = Interruptions(7200, 0.5)
    wanted = next_save_s(SaveCost(2.0), expected, 1e6)
    assert next_save_s(SaveCost(2.0), expected, 1e6, wanted * 1.2) == math.inf
    assert next_save_s(SaveCost(2.0), expected, 1e6, wanted * 1.9) == pytest.approx(wanted * 0.95)


# -- what is learnt ------------------------------------------------------------------------------------------------------


def both(one: History, other: History) -> History:
    return History(one.uptime_s + other.uptime_s, one.announced + other.announced, one.unannounced + other.unannounced)


@given(prior=expectations)
def test_without_a_history_the_settings_hold(prior: Interruptions) -> None:
    found = learn(prior, History())
    assert found.mean_time_s == pytest.approx(prior.mean_time_s)
    assert found.unannounced_share == pytest.approx(prior.unannounced_share)


@given(prior=expectations, history=histories)
def test_what_is_learnt_lies_between_the_settings_and_the_history(prior: Interruptions, history: History) -> None:
    found = learn(prior, history)
    seen = history.announced + history.unannounced
    if seen:
        rates = sorted((1 / prior.mean_time_s, seen / history.uptime_s if history.uptime_s else math.inf))
        assert rates[0] * 0.999 <= 1 / found.mean_time_s <= rates[1] * 1.001
        shares = sorted((prior.unannounced_share, history.unannounced / seen))
        assert shares[0] - 1e-9 <= found.unannounced_share <= shares[1] + 1e-9
    else:
        assert found.mean_time_s >= prior.mean_time_s * 0.999
        assert found.unannounced_share == pytest.approx(prior.unannounced_share)


@given(prior=expectations, history=histories, more_s=st.floats(1, 1e6))
def test_each_interruption_and_each_quiet_hour_count(prior: Interruptions, history: History, more_s: float) -> None:
    found = learn(prior, history)
    assert learn(prior, both(history, History(more_s))).mean_time_s > found.mean_time_s
    announced = learn(prior, both(history, History(0.0, 1, 0)))
    unannounced = learn(prior, both(history, History(0.0, 0, 1)))
    assert announced.mean_time_s == unannounced.mean_time_s < found.mean_time_s
    assert announced.unannounced_share <= found.unannounced_share <= unannounced.unannounced_share


def test_settings_that_were_wrong_are_forgotten() -> None:
    throw = numpy.random.default_rng(0)
    gaps_s, unannounced = throw.exponential(3000.0, 2000), throw.random(2000) < 0.3
    count = int(unannounced.sum())
    found = learn(Interruptions(1e5, 0.9), History(float(gaps_s.sum()), 2000 - count, count))
    assert found.mean_time_s == pytest.approx(3000, rel=0.1)
    assert found.unannounced_share == pytest.approx(0.3, rel=0.1)


# -- against a simulation ------------------------------------------------------------------------------------------------

RESTART_S, ANSWER_S = 120.0, 10.0
SETTINGS = [
    (stall_s, mean_s, share)
    for stall_s in (0.2, 2.0, 15.0, 45.0, 120.0)
    for mean_s in (3600.0, 10_000.0)
    for share in (0.02, 0.05, 0.2, 0.5, 1.0)
]


@pytest.fixture(scope="module")
def waste() -> Callable[[float, float, float, float], float]:
    """Simulates the same fifty thousand interruptions for every interval: the share of all time that trained nothing."""
    throw = numpy.random.default_rng(7)
    unit, dice = throw.exponential(1.0, 50_000), throw.random(50_000)

    def simulate(interval_s: float, stall_s: float, mean_s: float, share: float) -> float:
        upload_s = min(20.0, interval_s)
        lived_s, announced = unit * mean_s, dice >= share
        begun, left_s = numpy.divmod(lived_s, interval_s + stall_s)
        saved_s = begun * interval_s + numpy.minimum(left_s, interval_s)
        committed_s = numpy.maximum(numpy.floor_divide(lived_s - upload_s, interval_s + stall_s), 0) * interval_s
        trained_s = numpy.where(announced, saved_s, committed_s).sum()
        return float(1 - trained_s / (lived_s + RESTART_S + ANSWER_S * announced).sum())

    return simulate


def intervals_s(around_s: float) -> Iterator[float]:
    yield from (around_s * 2 ** (exponent / 3) for exponent in range(-7, 8))


@pytest.mark.parametrize(("stall_s", "mean_s", "share"), SETTINGS)
def test_no_interval_wastes_much_less_than_the_one_chosen(
    waste: Callable[[float, float, float, float], float], stall_s: float, mean_s: float, share: float
) -> None:
    chosen_s = best_interval_s(stall_s, Interruptions(mean_s, share))
    tried = {interval_s: waste(interval_s, stall_s, mean_s, share) for interval_s in intervals_s(chosen_s)}
    assert tried[chosen_s] <= 1.05 * min(tried.values())
    assert max(tried.values()) > 1.05 * min(tried.values()), "any interval would have passed"


def test_fifty_settings_are_simulated() -> None:
    assert len(SETTINGS) == 50


def test_the_waste_is_what_the_derivation_says(waste: Callable[[float, float, float, float], float]) -> None:
    stall_s, mean_s, share, interval_s = 2.0, 10_000.0, 0.2, 400.0
    lost_s = share * (interval_s / 2 + 20.0) + (1 - share) * ANSWER_S + RESTART_S
    assert waste(interval_s, stall_s, mean_s, share) == pytest.approx(stall_s / interval_s + lost_s / mean_s, rel=0.05)
