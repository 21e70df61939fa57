"""SpotCheckpointManager: checkpoints of a loop of one's own, in a run like that of a Trainer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from hf_spot.arguments import SpotArguments
from hf_spot.storage.store import ObjectStore
from hf_spot.training.loop.loop_manager import LoopManager
from hf_spot.training.loop.loop_states import AcceleratorState, PlainState
from hf_spot.training.upstream import OPTIMIZERS


class SpotCheckpointManager(LoopManager):
    """Saves a training loop of your own to a run, and brings it back: model, optimizer, schedule, random states, and the place
    in the DataLoader that it iterates.

    ::

        manager = SpotCheckpointManager("s3://bucket/runs/my-run", save_every_n_steps=500)
        step, epoch = manager.load_latest(model, optimizer, scheduler)
        for epoch in range(epoch, epochs):
            for batch in dataloader:
                ...
                step += 1
                if step % manager.save_every_n_steps == 0:
                    manager.save(model, optimizer, scheduler, step, epoch, loss)
                if manager.interrupted:
                    manager.save(model, optimizer, scheduler, step, epoch, loss)
                    sys.exit(75)

    ``break`` and ``return`` do as well. Files are uploaded behind the training; a save after an interruption returns when it is
    committed. Whatever begins to iterate a DataLoader after that ends with `TrainingPreempted`. Used as a context manager it
    marks the run as finished at the end of the block, and ends with `TrainingPreempted` after an interruption.

    With several ranks (DDP) each must call every method.

    Args:
        checkpoint_dir: the run: ``s3://bucket/prefix``, or a directory. None is that of `hf-spot launch`.
        save_every_n_steps: for the loop to read; at least 1.
        args: settings; None takes those of `hf-spot launch`, or the defaults.
        local_dir: folder of this machine for files on their way; None is ``checkpoint_dir`` where that is a directory, else a
            folder in the user's cache.

    Raises:
        ConfigError: a value can't be used.
    """

    @staticmethod
    def for_accelerator(
        accelerator: Any,
        checkpoint_dir: str | os.PathLike[str] | ObjectStore | None = None,
        save_every_n_steps: int = 500,
        *,
        args: SpotArguments | None = None,
        local_dir: str | os.PathLike[str] | None = None,
    ) -> AcceleratorCheckpointManager:
        """For a loop with an ``accelerate.Accelerator``, after its ``prepare``: the manager's methods are then
        ``save(step, epoch, loss)`` and ``load_latest()``.

        Args:
            accelerator: whose ``save_state`` and ``load_state`` are used.
            checkpoint_dir: as above.
            save_every_n_steps: as above.
            args: as above.
            local_dir: as above.
        """
        manager = AcceleratorCheckpointManager(checkpoint_dir, save_every_n_steps, args=args, local_dir=local_dir)
        manager.accelerator = accelerator
        return manager

    def load_latest(self, model: nn.Module, optimizer: Any = None, scheduler: Any = None) -> tuple[int, int]:
        """Loads the newest whole checkpoint; the step and the epoch that it was saved with, and (0, 0) when there is none.

        The epoch's DataLoader then begins with the batches that were not trained.

        Raises:
            ConfigError: it is that of another model.
            CorruptCheckpoint: there are checkpoints, and none is whole.
            StoreError: the store could not be asked.
        """
        return self._load(PlainState(model, optimizer, scheduler), optimizer)

    def save(
        self,
        model: nn.Module,
        optimizer: Any,
        scheduler: Any,
        step: int,
        epoch: int,
        loss: Any = None,
        *,
        dataloader: Any = None,
    ) -> None:
        """Writes a checkpoint, and has it uploaded. A step that is saved already is not saved again.

        Args:
            model: also wrapped by DDP or ``torch.compile``.
            optimizer: or None.
            scheduler: or None.
            step: optimizer steps done in all epochs.
            epoch: under way; behind the end of its DataLoader, the next one.
            loss: for the record.
            dataloader: the one (or a list of those) that the loop is in the middle of, where that should not be found out.

        Raises:
            ConfigError: a value can't be used.
            StoreError: the local disk can't be written to; what was saved before is committed first.
            Fenced: a newer launch owns the run.
            TrainingPreempted: the loop has been saved for an interruption, and went on.
        """
        self._save(PlainState(model, optimizer, scheduler), step, epoch, loss, dataloader)


class AcceleratorCheckpointManager(LoopManager):
    """What `SpotCheckpointManager.for_accelerator` returns."""

    accelerator: Any

    def load_latest(self) -> tuple[int, int]:
        """As that of `SpotCheckpointManager`, for what the accelerator has prepared."""
        optimizers: Sequence[Any] = OPTIMIZERS.of(self.accelerator) if OPTIMIZERS.is_on(self.accelerator) else ()
        return self._load(AcceleratorState(self.accelerator), optimizers[0] if optimizers else None)

    def save(self, step: int, epoch: int, loss: Any = None, *, dataloader: Any = None) -> None:
        """As that of `SpotCheckpointManager`, for what the accelerator has prepared."""
        self._save(AcceleratorState(self.accelerator), step, epoch, loss, dataloader)
