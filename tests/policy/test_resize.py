from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_spot.policy.resize import Batches, Fit, fit, keep_total, repair

batches = st.builds(Batches, st.integers(1, 64), st.integers(1, 64), st.integers(1, 64))


@pytest.mark.parametrize(
    ("before", "now", "found", "hint"),
    [
        (Batches(4, 2, 8), Batches(4, 2, 8), Fit.SAME, "--gradient_accumulation_steps 2"),
        (Batches(4, 2, 8), Batches(4, 4, 4), Fit.REGROUPED, "--gradient_accumulation_steps 4"),
        (Batches(4, 2, 8), Batches(4, 2, 4), Fit.OTHER, "--gradient_accumulation_steps 4"),
        (Batches(3, 1, 2), Batches(4, 1, 2), Fit.OTHER, "--per_device_train_batch_size 3"),
        (Batches(3, 1, 1), Batches(2, 1, 2), Fit.OTHER, ""),
    ],
)
def test_what_fits(before: Batches, now: Batches, found: Fit, hint: str) -> None:
    assert fit(before, now) is found
    assert repair(before, now) == hint


@given(batches, batches)
def test_following_the_hint_brings_the_total_back(before: Batches, now: Batches) -> None:
    flag, _, value = repair(before, now).partition(" ")
    if flag == "--gradient_accumulation_steps":
        now = Batches(now.per_device, int(value), now.world_size)
    elif flag:
        now = Batches(int(value), now.accumulation, now.world_size)
    assert not flag or fit(before, now) is not Fit.OTHER


@pytest.mark.parametrize(
    ("before", "now", "kept"),
    [
        (Batches(4, 1, 2), Batches(4, 1, 1), Batches(4, 2, 1)),
        (Batches(4, 2, 8), Batches(4, 2, 4), Batches(4, 4, 4)),
        (Batches(8, 1, 4), Batches(2, 1, 4), Batches(2, 4, 4)),  # smaller GPUs
        (Batches(4, 2, 2), Batches(4, 2, 8), Batches(2, 1, 8)),  # more ranks than micro-batches
        (Batches(3, 1, 2), Batches(4, 1, 2), Batches(3, 1, 2)),
        (Batches(4, 2, 2), Batches(4, 3, 2), None),  # somebody asked for another accumulation
        (Batches(3, 1, 1), Batches(2, 1, 2), None),
    ],
)
def test_what_keeps_the_total(before: Batches, now: Batches, kept: Batches | None) -> None:
    assert keep_total(before, now) == kept


@given(batches, batches)
def test_what_keeps_the_total_never_needs_more_memory_or_other_ranks(before: Batches, now: Batches) -> None:
    kept = keep_total(before, now)
    if kept is not None:
        assert kept.total == before.total
        assert kept.world_size == now.world_size
        assert kept.per_device <= now.per_device
