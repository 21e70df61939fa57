"""Batches of a loader by the run's micro-batches, with random numbers that belong to the batch and not to a rank or worker.

A dataset or a collator that draws random numbers (augmentation, masked tokens) gets them from Python's, numpy's and torch's
generators. These are seeded for each batch, in whatever process makes it, and restored behind it.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy.random
import torch
from torch.utils.data import BatchSampler

from hf_spot.policy.micro_batches import DATA, Shares, seed_of, steps_in, turns
from hf_spot.training.data.rng import capture, forget, restore
from hf_spot.training.upstream import FETCH

_plain_fetch = FETCH.find()


class MicroBatch(list[int]):
    """The indices of a micro-batch's samples, with the seed for making it.

    Workers of all kinds get it pickled. Those of "spawn" have not inherited `seed_fetches`, so that receiving one calls it.
    """

    seed: int

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (list(self), self.seed)


def _received(indices: list[int], seed: int) -> MicroBatch:
    seed_fetches()
    batch = MicroBatch(indices)
    batch.seed = seed
    return batch


class MicroBatches(BatchSampler):
    """The micro-batches that a rank computes, in order, out of a sampler for all ranks.

    Args:
        inner: yields all micro-batches of a pass.
        shares: how they are divided.
        rank: this rank.
        seed: of the training's data.
        epoch: returns the number of the pass over the data that begins.
    """

    def __init__(self, inner: Any, shares: Shares, rank: int, seed: int, epoch: Callable[[], int]) -> None:
        self.batch_sampler = inner  # the name by which accelerate and Trainer look for the sampler below
        self.batch_size = inner.batch_size
        self.drop_last = inner.drop_last
        self._shares = shares
        self._rank = rank
        self._seed = seed
        self._epoch = epoch

    @property
    def sampler(self) -> Any:
        """Return the sampler of single indices."""
        return getattr(self.batch_sampler, "sampler", None)

    @sampler.setter
    def sampler(self, sampler: Any) -> None:
        self.batch_sampler.sampler = sampler

    @property
    def batches(self) -> int:
        """Return the number of micro-batches of a pass, on all ranks together."""
        return len(self.batch_sampler)

    def __len__(self) -> int:
        return steps_in(self.batches, self._shares.count) * self._shares.each

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self._epoch()
        for turn in turns(self.batch_sampler, self._shares, self._rank):
            batch = MicroBatch(turn.value)
            batch.seed = seed_of(self._seed, DATA, (epoch, turn.number))
            yield batch


@contextlib.contextmanager
def seeded(seed: int, *, gpus: bool = False) -> Iterator[None]:
    """Seed Python's, numpy's and torch's generators within the block, and restore their states behind it.

    Args:
        seed: the seed.
        gpus: also seed the generator of this process's GPU.
    """
    before = capture()
    device = torch.cuda.get_rng_state() if gpus else None
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if gpus:
        torch.cuda.manual_seed(seed)
    forget()
    try:
        yield
    finally:
        restore(before)
        if device is not None:
            torch.cuda.set_rng_state(device)


def seed_fetches() -> None:
    """Make this process, and the workers that are forked from it, seed the making of each `MicroBatch`.

    Other batches are made as before. Repeated calls do nothing.
    """
    FETCH.put(_fetch)


def _fetch(self: Any, index: Any) -> Any:
    if not isinstance(index, MicroBatch):
        return _plain_fetch(self, index)
    with seeded(index.seed):
        return _plain_fetch(self, index)
