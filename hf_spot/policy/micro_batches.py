"""Which rank computes which micro-batch of an optimizer step, so that the step does not depend on the number of ranks. Pure.

An optimizer step is a number of micro-batches, which the run keeps for good. Each has a number in its step, and random
numbers of its own. Ranks take turns: rank r of R computes the micro-batches r, r + R, r + 2R and so on. All ranks compute
equally many, since they meet in collective calls: where the micro-batches don't suffice, a rank computes one again, and its
result is dropped.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

T = TypeVar("T")

MODEL, DATA = "model", "data"


@dataclass(frozen=True)
class Shares:
    """How the micro-batches of an optimizer step are divided among ranks.

    Args:
        count: micro-batches in a full step.
        ranks: number of ranks.
    """

    count: int
    ranks: int

    @property
    def each(self) -> int:
        """Return how many micro-batches each rank computes in a step, including those whose result is dropped."""
        return -(-self.count // self.ranks)

    @property
    def dropped(self) -> int:
        """Return how many results of a full step are dropped: ranks without a micro-batch of their own."""
        return self.each * self.ranks - self.count

    def number(self, rank: int, turn: int) -> int:
        """Return the number in its step of the micro-batch that a rank computes in a turn. From `count` on it is dropped."""
        return turn * self.ranks + rank


@dataclass(frozen=True)
class Turn(Generic[T]):
    """What a rank computes in a turn.

    Args:
        value: the micro-batch.
        number: its number in the pass over the data.
    """

    value: T
    number: int


def turns(batches: Iterable[T], shares: Shares, rank: int) -> Iterator[Turn[T]]:
    """Yield what a rank computes in a pass over the data, turn by turn.

    The last step may have fewer micro-batches than the others, as on a single GPU; no micro-batch is left out or repeated in
    it.

    Args:
        batches: all micro-batches of the pass, in order.
        shares: how they are divided.
        rank: the rank.
    """
    left, first = iter(batches), 0
    while step := list(islice(left, shares.count)):
        for turn in range(shares.each):
            number = shares.number(rank, turn)
            number = number if number < len(step) else 0
            yield Turn(step[number], first + number)
        first += len(step)


def steps_in(batches: int, count: int) -> int:
    """Return the number of optimizer steps in a pass over the data.

    Args:
        batches: micro-batches in the pass.
        count: micro-batches in a full step.
    """
    return -(-batches // count)


def count_in(step: int, batches: int, count: int) -> int:
    """Return how many micro-batches an optimizer step has.

    Args:
        step: number of the step in its pass, from 0.
        batches: micro-batches in the pass.
        count: micro-batches in a full step.
    """
    return min(count, batches - step * count)


def seed_of(seed: int, purpose: str, place: Sequence[int]) -> int:
    """Return the seed of a micro-batch's random numbers: 63 bits that depend on nothing else.

    Args:
        seed: of the training.
        purpose: what is drawn: `MODEL` or `DATA`.
        place: numbers that say which micro-batch of the training it is.
    """
    told = struct.pack(f"<{len(place) + 1}q", seed, *place)
    return int.from_bytes(hashlib.blake2b(purpose.encode() + told, digest_size=8).digest(), "little") >> 1
