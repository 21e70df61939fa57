"""Datasets without a length that are gone through more than once.

Trainer takes such a training for one epoch of ``max_steps`` steps: on resume it skips all batches that were ever trained, as
if the first pass had held them. Its own ``state.epoch`` tells better: whole passes before the point, and behind it the
batches of the pass under way, in units of ``max_steps`` times the accumulation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import IterableDataset
from transformers import Trainer
from transformers.trainer_utils import has_length

from hf_spot.policy.resize import Batches


@contextmanager
def resumed_in_its_pass(trainer: Trainer, details: dict[str, Any], before: Batches, now: Batches) -> Iterator[None]:
    """Within it, a training on a stream resumes in the pass of the checkpoint, behind what that pass had given.

    Args:
        trainer: about to resume.
        details: of the commit that it resumes from.
        before: how its steps were put together then.
        now: and are now.
    """
    if not isinstance(trainer.train_dataset, IterableDataset) or has_length(trainer.train_dataset):
        yield
        return
    plain_init = trainer._init_training_state
    passes = int(details["epoch_of_data"])
    done = round((details["epoch_of_data"] - passes) * details["max_steps"] * before.accumulation)
    in_pass = done * before.per_device * before.world_size // (now.per_device * now.world_size)

    def init_training_state(*args: Any, **kwargs: Any) -> tuple[int, int]:
        plain_init(*args, **kwargs)
        return passes, in_pass

    trainer._init_training_state = init_training_state
    try:
        yield
    finally:
        trainer.__dict__.pop("_init_training_state", None)
