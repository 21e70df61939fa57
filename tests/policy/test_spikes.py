"""Which losses stand out."""

from __future__ import annotations

import math
import random

import pytest

from hf_spot.policy.spikes import Spikes


def test_losses_that_fall_and_scatter_have_no_spikes() -> None:
    spikes, chance = Spikes(), random.Random(1)
    for step in range(1, 5000):
        assert spikes.look(step, 2 + 8 * math.exp(-step / 500) + chance.gauss(0, 0.3)) is None


def test_a_spike_is_told_once_with_what_was_usual() -> None:
    spikes, chance = Spikes(), random.Random(1)
    for step in range(1, 301):
        assert spikes.look(step, chance.gauss(2, 0.1)) is None
    found = [spikes.look(step, 9.0) for step in range(301, 305)]
    assert found[0] is not None and found[1:] == [None, None, None]
    assert "step 301: the loss is 9; the median of the 200 steps before is " in found[0].in_words()
    assert spikes.look(400, 9.0) is not None


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_nan_stands_out_from_the_first_step_on_and_changes_nothing(loss: float) -> None:
    spikes = Spikes()
    found = spikes.look(1, loss)
    assert found is not None and "the loss is" in found.in_words() and "median" not in found.in_words()
    for step in range(30, 300):
        assert spikes.look(step, 2.0) is None
    assert spikes.look(301, 2.5) is None and spikes.look(302, None) is None
    assert spikes.look(303, 3.5) is not None
