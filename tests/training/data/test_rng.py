"""What is taken of the random generators is what they draw from next, whoever has used them in between."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

from hf_spot.training.data.rng import capture, pack, restore, unpack

BETWEEN: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "one of a pair of normal numbers": lambda: numpy.random.normal(),
    "a pair of normal numbers": lambda: numpy.random.normal(size=2),
    "an integer": lambda: numpy.random.randint(10),
    "a shuffle": lambda: numpy.random.shuffle([1, 2, 3]),
    "another seed": lambda: numpy.random.seed(3),
    "the same seed": lambda: numpy.random.seed(0),
    "python's": lambda: random.random(),
    "one of python's pair of normal numbers": lambda: random.gauss(0, 1),
    "python's seed": lambda: random.seed(0),
    "torch's": lambda: torch.rand(1),
}


def draws() -> list[float]:
    return [numpy.random.normal(), numpy.random.random(), random.gauss(0, 1), random.random(), torch.rand(1).item()]


@pytest.mark.parametrize("after", BETWEEN.values(), ids=BETWEEN.keys())
@pytest.mark.parametrize("before", BETWEEN.values(), ids=BETWEEN.keys())
def test_a_captured_state_gives_the_same_draws_again(before: Callable[[], Any], after: Callable[[], Any]) -> None:
    numpy.random.seed(0)
    random.seed(0)
    capture()
    before()
    capture()
    after()
    state = capture()
    drawn = draws()
    restore(state)
    assert draws() == drawn
    restore(unpack(pack(state)))
    assert draws() == drawn


@pytest.mark.parametrize("normal", [numpy.random.normal, random.gauss], ids=["numpy", "python"])
def test_a_restored_half_of_a_pair_is_seen(normal: Callable[..., float]) -> None:
    numpy.random.seed(0)
    random.seed(0)
    normal(0, 1)
    half = capture()
    normal(0, 1)  # the other half: the generator itself does not move
    capture()
    restore(half)
    again = capture()
    drawn = draws()
    restore(again)
    assert draws() == drawn


@pytest.mark.parametrize("library", ["python", "numpy"])
def test_a_state_that_has_not_changed_is_not_handed_out_anew(library: str) -> None:
    random.seed(0)
    numpy.random.seed(0)
    assert capture()[library] is capture()[library]


def test_a_generator_of_another_kind_is_captured_too() -> None:
    plain = numpy.random.get_bit_generator()
    try:
        numpy.random.set_bit_generator(numpy.random.MT19937(5))
        state, drawn = capture(), numpy.random.random()
        restore(state)
        assert numpy.random.random() == drawn
    finally:
        numpy.random.set_bit_generator(plain)
