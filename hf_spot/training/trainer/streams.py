"""Datasets without a length, iterated more than once or drawing random numbers.

Trainer treats such a training as one epoch of ``max_steps`` steps: at a resume it skips all batches that were ever trained, as
if the first pass had contained them. Its own ``state.epoch`` is right: the integer part counts whole passes, and the fraction
the batches of the current pass, in units of ``max_steps`` times the accumulation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import IterableDataset
from transformers import Trainer
from transformers.trainer_utils import IntervalStrategy, has_length

from hf_spot.errors import ConfigError
from hf_spot.log import warn_for_all
from hf_spot.policy.passes import Place
from hf_spot.policy.resize import Batches
from hf_spot.training.data.rng import capture, pack
from hf_spot.training.state.data_side import DataSide, parts_of
from hf_spot.training.upstream import GET_BATCH_SAMPLES, INIT_TRAINING_STATE
from hf_spot.training.versions import how_to_install

_LOOKS = 4


@contextmanager
def resumed_in_its_pass(
    trainer: Trainer, details: dict[str, Any], place: Place, before: Batches, now: Batches
) -> Iterator[None]:
    """Resume a training on a stream in the right pass and at the right batch within the block.

    Args:
        trainer: the Trainer, about to resume.
        details: details of the commit that it resumes from.
        place: where that is in the data.
        before: how its steps were composed at the save.
        now: how they are composed now.

        Raises:
            ConfigError: Trainer resumes at another batch than expected.
    """
    if not isinstance(trainer.train_dataset, IterableDataset) or has_length(trainer.train_dataset):
        yield
        return
    plain_init = INIT_TRAINING_STATE.of(trainer)
    passes = place.number
    if passes and trainer.args.dataloader_num_workers and trainer.args.dataloader_persistent_workers:
        warn_for_all(
            "pass %d of the stream is resumed with new DataLoader workers, but an uninterrupted run keeps its workers: random "
            "numbers differ from those of an uninterrupted run; for exact results set dataloader_persistent_workers=False",
            passes + 1,
        )
    trained = details["epoch_of_data"] - passes if place.is_in_middle else 0
    done = round(trained * details["max_steps"] * before.accumulation)
    in_pass = done * before.per_device * before.world_size // (now.per_device * now.world_size)

    def init_training_state(*args: Any, **kwargs: Any) -> tuple[int, int]:
        theirs = plain_init(*args, **kwargs)
        all_in_one_pass = (0, trainer.state.global_step * trainer.args.gradient_accumulation_steps)
        if theirs not in (all_in_one_pass, (passes, in_pass)):
            raise ConfigError(
                f"this Trainer resumes a stream at batch {theirs[1]} of pass {theirs[0]}; it was interrupted at batch "
                f"{in_pass} of pass {passes}",
                hint=how_to_install({"transformers"}),
            )
        return passes, in_pass

    INIT_TRAINING_STATE.set(trainer, init_training_state)
    try:
        yield
    finally:
        INIT_TRAINING_STATE.restore(trainer)


@contextmanager
def random_streams_named(trainer: Trainer) -> Iterator[None]:
    """Warn within the block if a stream draws from this process's global generators, or changes what evaluations change.

    A resumed training reads the stream again from its start, between other draws and without the evaluations, and gets other
    samples.

    Args:
        trainer: the Trainer, about to train.
    """
    if not isinstance(trainer.train_dataset, IterableDataset) or trainer.args.dataloader_num_workers:
        yield
        return
    plain_get = GET_BATCH_SAMPLES.of(trainer)
    begun: Any = None
    looks = _LOOKS

    def get_batch_samples(epoch_iterator: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal begun, looks
        if not looks or epoch_iterator is not begun:  # the first fetch of each epoch also draws the seed of its DataLoader
            begun = epoch_iterator
            return plain_get(epoch_iterator, *args, **kwargs)
        side = DataSide(parts_of(trainer.callback_handler.train_dataloader))
        before, before_side = pack(capture()), side.capture()
        fetched = plain_get(epoch_iterator, *args, **kwargs)
        looks -= 1
        # One rank that reads for several does not know which batch each state belongs to.
        evaluates, of_many = trainer.args.eval_strategy != IntervalStrategy.NO, trainer.args.world_size > 1
        if (evaluates or of_many) and side.capture() != before_side:
            looks = 0
            warn_for_all(
                "a stream's %s change while it is read, and %s: after a resume in the middle of an epoch it gives other "
                "samples; for exact results let the collator and the data set keep nothing%s",
                " and ".join(sorted(name for name, value in side.capture().items() if before_side.get(name) != value)),
                "one rank reads it for all" if of_many else "evaluations may change them, too",
                "" if of_many else ", or set --eval_strategy no",
            )
            return fetched
        if pack(capture()) != before:
            looks = 0
            warn_for_all(
                "%s draws random numbers from the global generators of the training process: after a resume in the middle of "
                "an epoch it gives other samples; for exact results set dataloader_num_workers=1, or give it its own generator",
                type(trainer.train_dataset).__name__,
            )
        return fetched

    GET_BATCH_SAMPLES.set(trainer, get_batch_samples)
    try:
        yield
    finally:
        GET_BATCH_SAMPLES.restore(trainer)
