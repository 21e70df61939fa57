from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import numpy
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from hf_spot.training.ranks.exact_sum import NOTHING, Levels, add, levels_of, of_one, rounded, sum_of_two

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
ANY_FLOATS = st.floats(width=32)
# Numbers that cancel, or differ by just so much that float64 has no room for both.
HARD = st.builds(
    lambda sign, bits, power: float(numpy.float32(sign * math.ldexp(bits, power))),
    st.sampled_from((-1, 1)),
    st.integers(1, 2**24 - 1),
    st.sampled_from((-149, -126, -80, -60, -54, -53, -30, -29, -24, 0, 24, 29, 53, 100)),
)
SUMMANDS = st.lists(st.one_of(FLOATS, HARD), min_size=1, max_size=9)


def _of(number: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor([number], dtype=dtype)


def _levels(numbers: list[float]) -> Levels:
    levels = levels_of(_of(numbers[0]))
    for number in numbers[1:]:
        add(levels, _of(number))
    return levels


def _sum(numbers: list[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return rounded(_levels(numbers), dtype)


def _bits(tensor: torch.Tensor) -> int:
    return int(tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16).item())


def _nearest(exact: Fraction, precision: int = 24, lowest: int = -149, highest: int = 128) -> float:
    """Return the float that is nearest to a fraction, computed with integers only; ties to even."""
    if exact == 0:
        return 0.0
    size = abs(exact)
    power = size.numerator.bit_length() - size.denominator.bit_length()
    power -= size < Fraction(2) ** power
    unit = Fraction(2) ** max(power - precision + 1, lowest)
    whole, rest = divmod(size, unit)
    if rest * 2 > unit or (rest * 2 == unit and whole % 2):
        whole += 1
    value = whole * unit
    found = math.inf if value >= Fraction(2) ** highest else float(value)
    return math.copysign(found, exact)


@given(SUMMANDS)
@example([1.0, 2.0**-60, -1.0])
@example([1.0, 2.0**-24, 2.0**-149])  # a tie in 24 bits, that only the last one breaks
@example([1.0, 2.0**-24])
@example([3.4028234663852886e38, 3.4028234663852886e38, -3.4028234663852886e38])
@example([2.0**127, 2.0**127, 2.0**-149, -(2.0**127)])
@example([2.0**-149, 2.0**-149, -(2.0**-149)])
def test_a_sum_is_the_float_nearest_to_the_exact_sum(numbers):
    assert _sum(numbers).item() == _nearest(sum(map(Fraction, numbers)))


@given(SUMMANDS)
@example([1.0, 2.0**-8, 2.0**-60])  # in float32 first, this would be a tie, and then round to even
@example([1.0, 2.0**-8 + 2.0**-24])
@example([2.0**-133, 2.0**-134])
def test_a_sum_of_16_bits_is_rounded_once(numbers):
    given_ = [float(torch.tensor(number).bfloat16()) for number in numbers]
    if all(map(math.isfinite, given_)):
        levels = levels_of(_of(given_[0], torch.bfloat16))
        for number in given_[1:]:
            add(levels, _of(number, torch.bfloat16))
        assert rounded(levels, torch.bfloat16).item() == _nearest(sum(map(Fraction, given_)), 8, -133)
    exact = sum(map(Fraction, numbers))
    assert _sum(numbers, torch.bfloat16).item() == _nearest(exact, 8, -133)
    assert _sum(numbers, torch.float16).item() == _nearest(exact, 11, -24, 16)


@given(
    st.lists(st.one_of(ANY_FLOATS, HARD, st.sampled_from((0.0, -0.0, math.inf, -math.inf, math.nan))), min_size=1, max_size=4)
)
@example([0.0, -0.0])
@example([-0.0, -0.0, -0.0])
@example([1.0, -1.0, -0.0])
@example([math.inf, -math.inf])
@example([math.inf, 1.0, 2.0**-149])
@example([2.0**127, 2.0**127, -math.inf])
@example([math.nan, 1.0])
@example([math.nan, -math.nan])
def test_a_sum_has_the_same_bits_in_every_order(numbers):
    found = {_bits(_sum(list(order))) for order in itertools.permutations(numbers)}
    assert len(found) == 1
    total = _sum(numbers).item()
    if any(map(math.isnan, numbers)) or {math.inf, -math.inf} <= set(numbers):
        assert math.isnan(total)
    elif math.inf in numbers or -math.inf in numbers:
        assert total == (math.inf if math.inf in numbers else -math.inf)
    elif total == 0:
        assert math.copysign(1, total) == (-1 if {str(one) for one in numbers} == {"-0.0"} else 1)


@given(SUMMANDS, st.integers(1, 5), st.randoms(use_true_random=False))
@example([-0.0, -0.0], 3, random.Random(1))  # a rank without a micro-batch adds nothing
def test_a_sum_has_the_same_bits_for_every_number_of_ranks(numbers, ranks, chance):
    alone = _bits(_sum(numbers))
    groups: list[list[float]] = [[] for _ in range(ranks)]
    for number in chance.sample(numbers, len(numbers)):
        chance.choice(groups).append(number)
    of_ranks = [_levels(group) if group else [_of(NOTHING, torch.float64)] for group in groups]
    chance.shuffle(of_ranks)
    together = levels_of(of_ranks[0][0])
    for level in [*of_ranks[0][1:], *(level for levels in of_ranks[1:] for level in levels)]:
        add(together, level)
    assert _bits(rounded(together, torch.float32)) == alone


@given(ANY_FLOATS, ANY_FLOATS)
def test_the_ways_for_one_and_for_two_summands_give_the_same_bits(one, other):
    assert _bits(sum_of_two(_of(one), _of(other))) == _bits(_sum([one, other]))
    assert _bits(of_one(_of(one))) == _bits(_sum([one]))


@pytest.mark.parametrize("count", [2, 3, 8, 33])
def test_large_tensors_of_all_magnitudes_are_summed_element_by_element(count):
    numbers = torch.Generator().manual_seed(count)
    length = 3 * 16384 + 5
    powers = torch.randint(-150, 125, (length,), generator=numbers) + torch.randint(-40, 1, (count, length), generator=numbers)
    summands = (torch.randn(count, length, generator=numbers).double() * 2.0 ** powers.double()).float()
    levels = levels_of(summands[0])
    for one in summands[1:]:
        add(levels, one)
    found = rounded(levels, torch.float32)
    for at in range(0, length, 101):
        exact = sum(map(Fraction, summands[:, at].tolist()))
        assert found[at].item() == _nearest(exact), summands[:, at].tolist()


def test_no_numbers_take_more_levels_than_the_bound_says():
    every = [math.ldexp(sign * (2**24 - 1), power) for power in range(-149, 105) for sign in (1, -1, 1)]
    levels = _levels([*every, *every[::-1]])
    assert 2 <= len(levels) <= 10
    assert rounded(levels, torch.float32).item() == _nearest(2 * sum(map(Fraction, every)))


def test_gradients_of_a_usual_training_take_one_level():
    torch.manual_seed(0)
    summands = torch.randn(8, 4096) * torch.rand(4096).exp()
    levels = levels_of(summands[0])
    for one in summands[1:]:
        add(levels, one)
    assert len(levels) == 1
    assert not torch.equal(rounded(levels, torch.float32), summands.sum(0)), "the running sum rounds as well as this"
