"""Repairs for faults of Trainer and accelerate at a resume.

Each repair first tests that its fault still exists: otherwise it would break what the library has fixed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import transformers.trainer
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, DataLoaderShard, skip_first_batches
from torch.utils.data import BatchSampler, IterableDataset, SequentialSampler
from transformers import Trainer, TrainerControl

from hf_spot.errors import ConfigError
from hf_spot.training.upstream import (
    CALLBACK_STATES,
    EXPORTABLE,
    SKIP_FIRST_BATCHES,
    SKIPS,
    SKIPS_INSIDE,
    SPLIT_BATCHES,
    TRAIN_TOKENS,
)
from hf_spot.training.upstream.versions import how_to_install

log = logging.getLogger("hf_spot")


def set_epoch(dataloader: Any, epoch: int) -> None:
    """Set the epoch of all samplers before trained batches are skipped.

    Trainer's own call at the start of an epoch does not reach them through the sampler that skips.
    """
    batch_sampler = getattr(dataloader, "batch_sampler", None)
    if reaches_through_skips(dataloader):
        return
    for one in (dataloader, SKIPS_INSIDE.of(batch_sampler) if SKIPS_INSIDE.is_on(batch_sampler) else None):
        if one is not None and hasattr(one, "set_epoch"):  # only samplers whose order depends on the epoch have it
            one.set_epoch(epoch)


class _EpochRecorder:
    """Records the epoch that was set."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class _RecordingSampler(_EpochRecorder, SequentialSampler):
    pass


class _RecordingBatchSampler(_EpochRecorder, BatchSampler):
    pass


def reaches_through_skips(dataloader: Any) -> bool:
    """Return whether ``set_epoch`` of such a loader reaches its samplers through the sampler that skips batches.

    Tries it on a tiny loader. Returns False for loaders that are not accelerate's.
    """
    kind = next((one for one in (DataLoaderDispatcher, DataLoaderShard) if isinstance(dataloader, one)), None)
    if kind is None:
        return False
    sampler = _RecordingSampler(range(4))
    batches = _RecordingBatchSampler(sampler, 1, False)
    inside: Any = batches
    if isinstance(getattr(dataloader, "batch_sampler", None), BatchSamplerShard):
        inside = BatchSamplerShard(batches, num_processes=1, process_index=0)
    skip_first_batches(kind(range(4), batch_sampler=inside), 1).set_epoch(3)
    return sampler.epoch == batches.epoch == 3


@contextmanager
def batches_skipped(
    watch: Callable[[Any], None] = lambda dataloader: None, reached: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Skip the right number of batches at a resume within the block, if rank 0 loads for all ranks (``dispatch_batches``).

    Each dispatched batch consists of one batch of the sampler per rank; ``accelerate.skip_first_batches`` counts the sampler's
    batches as if there were one rank. Raises ConfigError if it skips any other number.

    Args:
        watch: called with each loader that skips.
        reached: called when a loader without a dataset has made the trained batches again: the next one follows the save.
    """

    def make(plain_skip: Any) -> Any:
        def skip(dataloader: Any, num_batches: int = 0) -> Any:
            if not hasattr(dataloader, "dataset"):
                return _Behind(dataloader, num_batches, reached)
            skipping = skip_on_all_ranks(dataloader, num_batches)
            watch(skipping)
            return skipping

        def skip_on_all_ranks(dataloader: Any, num_batches: int) -> Any:
            skipping = plain_skip(dataloader, num_batches)
            dispatched = isinstance(dataloader, DataLoaderDispatcher) and not SPLIT_BATCHES.of(dataloader)
            if not dispatched or isinstance(dataloader.dataset, IterableDataset):
                return skipping
            ranks = dataloader.state.num_processes
            passed_over = _batches_of_sampler(dataloader) - _batches_of_sampler(skipping) + SKIPS.of(skipping) * ranks
            if passed_over == num_batches * ranks:
                return skipping
            if passed_over != num_batches:
                raise ConfigError(
                    f"accelerate skips {passed_over} batches, but {num_batches * ranks} were trained",
                    hint=how_to_install({"accelerate"}),
                )
            return plain_skip(dataloader, num_batches * ranks)

        return skip

    with SKIP_FIRST_BATCHES.replaced(transformers.trainer, make):
        yield


class _Behind:
    """Iterates a loader of the script's own class behind its trained batches, which are made again and dropped.

    Args:
        loader: any iterable.
        count: number of trained batches.
        reached: called when they are dropped.
    """

    def __init__(self, loader: Any, count: int, reached: Callable[[], None]) -> None:
        self._loader, self._count, self._reached = loader, count, reached

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader)
        for _ in range(self._count):
            next(batches, None)
        self._reached()
        yield from batches

    def __len__(self) -> int:
        return len(self._loader) - self._count

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_loader"], name)


def _batches_of_sampler(dataloader: Any) -> int:
    return len(dataloader.batch_sampler)


def counters(trainer: Trainer) -> dict[str, int]:
    """Return the counters that a trainer logs but does not save: TRL's ``num_tokens``. Other trainers have none."""
    return {one.name: one.of(trainer) for one in (TRAIN_TOKENS,) if one.is_on(trainer)}


def carry_counters(trainer: Trainer, counted: dict[str, int]) -> None:
    """Set the counters to what `counters` returned."""
    for one in (TRAIN_TOKENS,):
        if one.is_on(trainer) and one.name in counted:
            one.set(trainer, counted[one.name])


def carry_callback_states(trainer: Trainer) -> None:
    """Restore the state of stateful callbacks (``EarlyStoppingCallback``) from the checkpoint.

    Trainer does this only with ``restore_callback_states_from_checkpoint``, and then by creating new callbacks. Attributes that
    are already right are not set again.
    """
    if trainer.args.restore_callback_states_from_checkpoint:
        return
    carried: Any = CALLBACK_STATES.of(trainer.state)  # a dict, whatever its annotation says
    exportable: Any = EXPORTABLE.find()
    for name, states in carried.items():
        named = [one for one in trainer.callback_handler.callbacks if type(one).__name__ == name]
        for callback, state in zip(named, states if isinstance(states, list) else [states], strict=False):
            if isinstance(callback, exportable) and not isinstance(callback, TrainerControl):
                saved = state.get("attributes", {})
                forgotten = {
                    attribute: value for attribute, value in saved.items() if getattr(callback, attribute, None) != value
                }
                for attribute, value in forgotten.items():
                    setattr(callback, attribute, value)
                if forgotten:
                    log.info("restored the state of %s", name)
