"""What Trainer leaves out of a checkpoint, or does otherwise when it resumes, and what an interrupted run needs to end the same.

Each repair is applied from outside, to a resumed training only: an uninterrupted one stays as Trainer makes it. Seen with
transformers 5.23 and accelerate 1.15.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerControl
from transformers.trainer_callback import ExportableState

log = logging.getLogger("hf_spot")

_FOLDER = "epoch_start"  # inside a checkpoint; a rank's file has the name that Trainer gives to `rng_state`


class EpochStart:
    """Remembers the random state at the start of an epoch, which every checkpoint of that epoch carries.

    A sampler that draws its order from the global generators (``group_by_length``, ``use_seedable_sampler=False``) draws
    it at the start of the epoch. Trainer saves the state of the middle alone, and would resume with another order.

    Args:
        trainer: whose generators are saved and restored, by its own methods.
        folder: on this machine, for the state of the epoch under way; `close` removes it.
    """

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self._trainer = trainer
        self._folder = folder

    def begin(self, resumed: Path | None) -> None:
        """An epoch begins: remembers its random state, or returns to it when the epoch is resumed in its middle.

        Args:
            resumed: the checkpoint, if this epoch is resumed in its middle.
        """
        if resumed is not None and (resumed / _FOLDER).is_dir():
            # Not through the instance: a method put there is meant for the middle of the epoch.
            type(self._trainer)._load_rng_state(self._trainer, str(resumed / _FOLDER))
        self._folder.mkdir(parents=True, exist_ok=True)
        self._trainer._save_rng_state(str(self._folder))

    def save(self, checkpoint: Path) -> None:
        """Adds this rank's state to a checkpoint."""
        if self._folder.is_dir():
            shutil.copytree(self._folder, checkpoint / _FOLDER, dirs_exist_ok=True)

    def close(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)


def set_epoch(dataloader: Any, epoch: int) -> None:
    """Tells samplers which epoch it is as Trainer does at the start of each, but before it skips what was trained: through
    the sampler that skips, Trainer's own call does not reach them."""
    batch_sampler = getattr(dataloader, "batch_sampler", None)
    for one in (dataloader, getattr(batch_sampler, "batch_sampler", None)):
        if hasattr(one, "set_epoch"):
            one.set_epoch(epoch)


def carry_callback_states(trainer: Trainer) -> None:
    """Gives stateful callbacks (`EarlyStoppingCallback`) back what they knew at the checkpoint.

    Trainer does it only with ``restore_callback_states_from_checkpoint``, and then by making new callbacks.
    """
    if trainer.args.restore_callback_states_from_checkpoint:
        return
    for name, states in trainer.state.stateful_callbacks.items():
        named = [one for one in trainer.callback_handler.callbacks if type(one).__name__ == name]
        for callback, state in zip(named, states if isinstance(states, list) else [states], strict=False):
            if isinstance(callback, ExportableState) and not isinstance(callback, TrainerControl):
                for attribute, value in state.get("attributes", {}).items():
                    setattr(callback, attribute, value)
                log.info("%s goes on with what it knew", name)
