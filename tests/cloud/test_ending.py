"""When the billing of a machine ended, and how well that is known."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from hf_spot.cloud.ending import (
    AT_LEAST,
    AT_MOST,
    EXACT,
    GONE,
    OF_INSTANCE,
    OF_JOURNAL,
    OF_POLL,
    OF_REQUEST,
    SpotStatus,
    bound_of,
    ending_of,
    in_words,
)
from hf_spot.cloud.ladder import RECLAIMED

BEGAN = datetime(2030, 1, 1, tzinfo=timezone.utc)
GUEST, USER = "Client.InstanceInitiatedShutdown", "Client.UserInitiatedShutdown"


def at(minutes: float) -> datetime:
    return BEGAN + timedelta(minutes=minutes)


def status(code: str, minutes: float) -> SpotStatus:
    return SpotStatus(code, at(minutes))


NO_CAPACITY, BY_USER = "instance-terminated-no-capacity", "instance-terminated-by-user"


@pytest.mark.parametrize(
    ("reason", "told", "spot", "expected"),
    [
        (USER, at(30), None, (30, EXACT, OF_INSTANCE, USER)),
        (USER, at(30), status(BY_USER, 31), (30, EXACT, OF_INSTANCE, USER)),
        (RECLAIMED, None, status(NO_CAPACITY, 40), (40, EXACT, OF_REQUEST, RECLAIMED)),
        (RECLAIMED, None, status("marked-for-termination", 38), (60, AT_MOST, OF_POLL, RECLAIMED)),
        (RECLAIMED, None, status("fulfilled", 0), (60, AT_MOST, OF_POLL, RECLAIMED)),
        (RECLAIMED, None, None, (60, AT_MOST, OF_POLL, RECLAIMED)),
        (GUEST, None, status(BY_USER, 41), (41, AT_MOST, OF_REQUEST, GUEST)),
        (GUEST, None, status(BY_USER, 61), (60, AT_MOST, OF_POLL, GUEST)),
        (GUEST, None, None, (60, AT_MOST, OF_POLL, GUEST)),
        (None, None, status(NO_CAPACITY, 40), (40, EXACT, OF_REQUEST, RECLAIMED)),
        (None, None, status(BY_USER, 41), (41, AT_MOST, OF_REQUEST, GONE)),
        (None, None, status("fulfilled", 0), (20, AT_LEAST, OF_JOURNAL, GONE)),
        (None, None, None, (20, AT_LEAST, OF_JOURNAL, GONE)),
        (USER, at(-1), None, (0, EXACT, OF_INSTANCE, USER)),  # clocks differ
    ],
)
def test_what_ec2_tells_counts_and_what_it_does_not_tell_is_a_bound(
    reason: str | None, told: datetime | None, spot: SpotStatus | None, expected: tuple[float, str, str, str]
) -> None:
    found = ending_of(BEGAN, at(60), at(20), reason, told, spot)
    assert (found.time, found.bound, found.source, found.reason) == (at(expected[0]), *expected[1:])


def test_a_sum_says_how_well_its_parts_are_known() -> None:
    assert [bound_of(one) for one in ([], ["", ""], ["", AT_MOST], [AT_LEAST], [AT_MOST, AT_LEAST])] == [
        "",
        "",
        "at most",
        "at least",
        "about",
    ]
    assert [in_words(1.236, AT_MOST), in_words(1.236, EXACT), in_words(0.0, AT_MOST)] == ["at most $1.24", "$1.24", "$0.00"]
