"""SpotCheckpointManager: checkpoints of a custom training loop, in a run like that of a Trainer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from hf_spot.arguments import SpotArguments
from hf_spot.errors import ConfigError
from hf_spot.policy.resize import divided_otherwise
from hf_spot.storage.store import ObjectStore
from hf_spot.training.loop.loop_manager import LoopManager
from hf_spot.training.loop.loop_states import AcceleratorState, PlainState
from hf_spot.training.upstream import OPTIMIZERS


class SpotCheckpointManager(LoopManager):
    """Saves and restores a custom training loop: model, optimizer, scheduler, random states, and position in its DataLoader.

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

    ``break`` and ``return`` work as well. Files are uploaded in the background; a save after an interruption returns once it
    is committed. Iterating a DataLoader after that raises `TrainingPreempted`. As a context manager it marks the run as
    finished at the end of the block, or raises `TrainingPreempted` after an interruption.

    With several ranks (DDP) every rank must call every method.

    Args:
        checkpoint_dir: the run: ``s3://bucket/prefix``, or a directory. None uses that of `hf-spot launch`.
        save_every_n_steps: the interval between saves, for the loop to read; at least 1.
        args: settings; None uses those of `hf-spot launch`, or the defaults.
        local_dir: folder of this machine for files that are being written, uploaded or restored; None uses ``checkpoint_dir``
            if that is a directory, else a folder in the user's cache.

    Raises:
        ConfigError: a value can't be used.
    """

    _registered: tuple[Any, ...] = ()

    def register(self, *objects: Any) -> None:
        """Save and load further objects, such as a ``GradScaler`` or an average of weights.

        They have ``state_dict`` and ``load_state_dict``. Call it before `load_latest`, with the same objects in the same
        order in each launch.

        Raises:
            ConfigError: an object lacks these methods, or the manager has begun.
        """
        for one in objects:
            if not (callable(getattr(one, "state_dict", None)) and callable(getattr(one, "load_state_dict", None))):
                raise ConfigError(
                    f"a {type(one).__name__} can't be registered: it has no state_dict and load_state_dict",
                    hint="manager.register(scaler, averaged_model)",
                )
        if self.has_begun:
            raise ConfigError("register(…) comes too late", hint="call it before manager.load_latest(…)")
        self._registered = (*self._registered, *objects)

    @staticmethod
    def for_accelerator(
        accelerator: Any,
        checkpoint_dir: str | os.PathLike[str] | ObjectStore | None = None,
        save_every_n_steps: int = 500,
        *,
        args: SpotArguments | None = None,
        local_dir: str | os.PathLike[str] | None = None,
    ) -> AcceleratorCheckpointManager:
        """Return a manager for a loop with an ``accelerate.Accelerator``, after its ``prepare``.

        Its methods are ``save(step, epoch, loss)`` and ``load_latest()``.

        Args:
            accelerator: the accelerator; its ``save_state`` and ``load_state`` are used.
            checkpoint_dir: as in `SpotCheckpointManager`.
            save_every_n_steps: as in `SpotCheckpointManager`.
            args: as in `SpotCheckpointManager`.
            local_dir: as in `SpotCheckpointManager`.

        Raises:
            ConfigError: the accelerator divides a model in a way that can't be resumed exactly.
        """
        if divided := divided_otherwise(getattr(accelerator, "parallelism_config", None)):
            raise ConfigError(
                f"{divided}: accelerate's save_state and load_state are not known to be exact for tensor, context and "
                "sequence parallel loops",
                hint="shard the model with FSDP or DeepSpeed instead, which hf_spot saves and resumes exactly",
            )
        manager = AcceleratorCheckpointManager(checkpoint_dir, save_every_n_steps, args=args, local_dir=local_dir)
        manager.accelerator = accelerator
        return manager

    def load_latest(self, model: nn.Module, optimizer: Any = None, scheduler: Any = None) -> tuple[int, int]:
        """Load the newest intact checkpoint; return its step and epoch, or (0, 0) if there is none.

        The epoch's DataLoader then begins with the first batch that was not trained.

        Raises:
            ConfigError: the checkpoint is of another model.
            CorruptCheckpoint: there are checkpoints, but none is intact.
            StoreError: the store could not be read.
        """
        return self._load(PlainState(model, optimizer, scheduler, self._registered), optimizer)

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
        """Write a checkpoint, and upload it in the background. A step that was saved already is not saved again.

        Args:
            model: the model, possibly wrapped by DDP or ``torch.compile``.
            optimizer: the optimizer, or None.
            scheduler: the scheduler, or None.
            step: optimizer steps done, over all epochs.
            epoch: the current epoch; after the end of its DataLoader, the next one.
            loss: stored for information.
            dataloader: the DataLoader (or a list of them) that the loop is iterating; None detects it.

        Raises:
            ConfigError: a value can't be used.
            StoreError: the local disk can't be written to; earlier saves are committed first.
            Fenced: a newer launch owns the run.
            TrainingPreempted: the loop continued after its save for an interruption.
        """
        self._save(PlainState(model, optimizer, scheduler, self._registered), step, epoch, loss, dataloader)


class AcceleratorCheckpointManager(LoopManager):
    """The manager that `SpotCheckpointManager.for_accelerator` returns."""

    accelerator: Any

    def load_latest(self) -> tuple[int, int]:
        """Load what the accelerator has prepared, as `SpotCheckpointManager.load_latest` does."""
        optimizers: Sequence[Any] = OPTIMIZERS.of(self.accelerator) if OPTIMIZERS.is_on(self.accelerator) else ()
        return self._load(AcceleratorState(self.accelerator), optimizers[0] if optimizers else None)

    def save(self, step: int, epoch: int, loss: Any = None, *, dataloader: Any = None) -> None:
        """Save what the accelerator has prepared, as `SpotCheckpointManager.save` does."""
        self._save(AcceleratorState(self.accelerator), step, epoch, loss, dataloader)
