"""Whether there is room for copies of checkpoints in memory."""

from __future__ import annotations

import pytest

from hf_spot.policy.memory_tier import why_no_room

GB = 10**9


@pytest.mark.parametrize(
    ("size", "held", "limit", "available", "total", "why"),
    [
        (1.0, 0, None, 10, 16, None),
        (1.6, 0, None, 10, 16, "two copies of 1.6 GB are too much for 10 GB of free memory"),
        (1.6, 3.2, None, 1, 16, None),  # it is taken already
        (1.6, 3.2, None, 0.5, 16, "only 0.5 GB of memory are free"),
        (1.0, 0, 3, 4, 16, None),  # whoever sets a limit means it
        (1.0, 0, 2.9, 10, 16, "--save-memory-gb 2.9 has no room for three copies of 1 GB"),
        (1.0, 2, 3, 0.5, 16, "only 0.5 GB of memory are free"),
    ],
)
def test_memory_is_bounded_and_why_is_said(
    size: float, held: float, limit: float | None, available: float, total: float, why: str | None
) -> None:
    of = [None if one is None else int(one * GB) for one in (size, held, limit, available, total)]
    assert why_no_room(*of) == why  # type: ignore[arg-type]
