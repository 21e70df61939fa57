"""Repairs of what Trainer and accelerate do otherwise when they resume. Seen with transformers 5.23 and accelerate 1.15."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers.trainer
from accelerate.data_loader import DataLoaderDispatcher
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerControl
from transformers.trainer_callback import ExportableState

log = logging.getLogger("hf_spot")


def set_epoch(dataloader: Any, epoch: int) -> None:
    """Tells samplers which epoch it is as Trainer does at the start of each, but before it skips what was trained: through
    the sampler that skips, Trainer's own call does not reach them."""
    batch_sampler = getattr(dataloader, "batch_sampler", None)
    for one in (dataloader, getattr(batch_sampler, "batch_sampler", None)):
        if one is not None and hasattr(one, "set_epoch"):
            one.set_epoch(epoch)


@contextmanager
def dispatched_batches_skipped() -> Iterator[None]:
    """Within it, a resume skips what all ranks have trained of batches that rank 0 hands out (``dispatch_batches``).

    Each of them is made of one batch of the sampler for every rank; ``accelerate.skip_first_batches`` skips the sampler's
    batches as if there were one rank. Seen with accelerate 1.15.
    """
    plain_skip = transformers.trainer.skip_first_batches

    def skip(dataloader: Any, num_batches: int = 0) -> Any:
        dispatched = isinstance(dataloader, DataLoaderDispatcher) and not dataloader.split_batches
        if dispatched and not isinstance(dataloader.dataset, IterableDataset):
            num_batches *= dataloader.state.num_processes
        return plain_skip(dataloader, num_batches)

    transformers.trainer.skip_first_batches = skip
    try:
        yield
    finally:
        transformers.trainer.skip_first_batches = plain_skip


def counters(trainer: Trainer) -> dict[str, int]:
    """What a trainer counts for its log and does not save: TRL's tokens (``num_tokens``). Seen with TRL 1.16."""
    return {name: getattr(trainer, name) for name in ("_total_train_tokens",) if hasattr(trainer, name)}


def carry_counters(trainer: Trainer, counted: dict[str, int]) -> None:
    """Goes on counting from what `counters` told."""
    for name in counters(trainer).keys() & counted.keys():
        setattr(trainer, name, counted[name])


def carry_callback_states(trainer: Trainer) -> None:
    """Gives stateful callbacks (``EarlyStoppingCallback``) back what they knew at the checkpoint.

    Trainer does it only with ``restore_callback_states_from_checkpoint``, and then by making new callbacks.
    """
    if trainer.args.restore_callback_states_from_checkpoint:
        return
    carried: Any = trainer.state.stateful_callbacks  # a dict, whatever its annotation says
    for name, states in carried.items():
        named = [one for one in trainer.callback_handler.callbacks if type(one).__name__ == name]
        for callback, state in zip(named, states if isinstance(states, list) else [states], strict=False):
            if isinstance(callback, ExportableState) and not isinstance(callback, TrainerControl):
                for attribute, value in state.get("attributes", {}).items():
                    setattr(callback, attribute, value)
                log.info("%s goes on with what it knew", name)
