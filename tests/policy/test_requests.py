from __future__ import annotations

import pytest

from hf_spot.policy.requests import PART_BYTES, shortest_interval_s, writes_of_commit, writes_of_entry
from hf_spot.storage import s3_parts


def test_writes_are_counted_as_the_store_makes_them() -> None:
    assert PART_BYTES == s3_parts.PART_BYTES
    assert writes_of_entry() == 2
    assert writes_of_entry([0, PART_BYTES]) == 4
    assert writes_of_entry([PART_BYTES + 1]) == 2 + 2 + 2  # two parts, the beginning and the end
    assert writes_of_commit([1] * 8) == 12


def test_commits_are_as_far_apart_as_the_bound_says() -> None:
    assert shortest_interval_s(12, 1200) == pytest.approx(36)
