"""A run's budget, as a table."""

from __future__ import annotations

import pytest

from hf_spot.policy.budget import Budget, Used, left_s, warn_s, why_spent


@pytest.mark.parametrize(
    ("budget", "used", "word"),
    [
        (Budget(), Used(1e9, 1e9, 10**9), None),
        (Budget(max_hours=2), Used(hours=1.99), None),
        (Budget(max_hours=2), Used(hours=2), "2.00 of --max-hours 2"),
        (Budget(max_spend_usd=10), Used(spend_usd=9.99), None),
        (Budget(max_spend_usd=10), Used(spend_usd=10), "$10.00 of --max-spend 10"),
        (Budget(max_launches_without_progress=3), Used(launches_without_progress=2), None),
        (Budget(max_launches_without_progress=3), Used(launches_without_progress=3), "3 launches in a row"),
        (Budget(2, 10, 3), Used(1, 11, 0), "--max-spend"),
    ],
)
def test_what_is_used_up_is_named(budget: Budget, used: Used, word: str | None) -> None:
    why = why_spent(budget, used)
    assert why is None if word is None else word in str(why)


@pytest.mark.parametrize(
    ("budget", "used", "usd_per_hour", "expected"),
    [
        (Budget(), Used(), 5.0, None),
        (Budget(max_launches_without_progress=3), Used(), None, None),
        (Budget(max_hours=2), Used(hours=0.5), None, 5400.0),
        (Budget(max_spend_usd=10), Used(spend_usd=5), 10.0, 1800.0),
        (Budget(max_spend_usd=10), Used(spend_usd=5), 0.0, None),  # a machine that costs nothing
        (Budget(2, 10), Used(0.5, 5), 10.0, 1800.0),
        (Budget(max_hours=2), Used(hours=3), None, 0.0),
    ],
)
def test_the_time_that_is_left(budget: Budget, used: Used, usd_per_hour: float | None, expected: float | None) -> None:
    assert left_s(budget, used, usd_per_hour) == (None if expected is None else pytest.approx(expected))


def test_a_warning_comes_in_time() -> None:
    assert (warn_s(100.0), warn_s(86400.0)) == (10.0, 600.0)
    assert not Budget().is_set and Budget(max_hours=1).is_set
