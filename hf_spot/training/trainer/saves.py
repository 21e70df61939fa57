"""Saves that fail because of a disk: all ranks learn of it, and the incomplete checkpoint is removed."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint
import transformers.trainer
from torch.distributed.checkpoint.api import CheckpointException
from transformers import Trainer, TrainerCallback, TrainerControl

from hf_spot.errors import SpotError
from hf_spot.log import log_always
from hf_spot.training.ranks.agreement import Agreement
from hf_spot.training.ranks.disks import Disk
from hf_spot.training.saving.async_writer import AsyncCheckpointWriter
from hf_spot.training.saving.disk_errors import free_gb, in_words, is_of_a_disk
from hf_spot.training.trainer.own_state import SavedTensors
from hf_spot.training.upstream import (
    ON_SAVE,
    PEFT_CONFIG,
    PUSH_FROM_CHECKPOINT,
    ROTATE,
    SAVE,
    SAVE_CHECKPOINT,
    SAVE_MODEL,
    SAVE_OPTIMIZER,
    SAVE_RNG_STATE,
    SAVE_STATE,
    SAVE_TOGETHER,
    TORCH_SAVE,
    WANDB_LOGS_MODEL,
)

log = logging.getLogger("hf_spot")


_OF_A_SAVE = tuple(one.name for one in (SAVE_CHECKPOINT, SAVE_MODEL, SAVE, SAVE_OPTIMIZER))
_ONLY_WRITE = ("transformers", "trl", "sentence_transformers", "peft")


class Saves:
    """Replaces ``trainer._save_checkpoint`` from `watch` to `close`.

    A rank that can't write continues with the save as if it could, because other ranks may wait for it in a collective. At
    the end all ranks know: if one could not write, each disk's part of the folder is removed, no older checkpoint is rotated
    away, nothing is pushed to the Hub, and no callback is told of a save.

    Args:
        trainer: the Trainer.
        agreement: agreement of its ranks.
        disk: the disk that this rank writes to.
        behind: writes the files while training continues.
        finish: writes what Trainer does not save, on every rank; called with the folder and the tensors written so far.
        failed: called on every rank after a failed save. An exception from it ends the training.
        hold: called with an exception from what follows a save (a push to the Hub, the rotation of older checkpoints), perhaps
            by the writer thread. The checkpoint is complete, and is committed before the training learns of it.
    """

    def __init__(
        self,
        trainer: Trainer,
        agreement: Agreement,
        disk: Disk,
        behind: AsyncCheckpointWriter,
        finish: Callable[[Path, SavedTensors], None],
        failed: Callable[[SpotError], None],
        hold: Callable[[str, Exception], None],
    ) -> None:
        self._trainer = trainer
        self._agreement = agreement
        self._disk = disk
        self._behind = behind
        self._finish = finish
        self._saved = SavedTensors(trainer)
        self._failed = failed
        self._hold = hold
        self._output_dir = Path(trainer.args.output_dir or ".")
        self._trouble: SpotError | None = None
        self._folder = self._output_dir
        self._saving: int | None = None  # the thread
        self._at_the_end: list[Callable[[], None]] = []
        self._best: tuple[Any, Any, Any] = (None, None, None)

    def watch(self) -> None:
        """Start replacing. Call it when the training's state is complete."""
        self._best = self._best_now()
        if self._may_go_on() and (self._agreement.is_main or is_sharded(self._trainer)):
            self._behind.expect(_size_bytes(self._trainer.model, here=is_sharded(self._trainer)))
        plain_save = SAVE_CHECKPOINT.of(self._trainer)

        def save(*args: Any, **kwargs: Any) -> None:
            whole = self.settle()
            # After a failed save, write at once, so that an error is found where it happens.
            goes_on = all(self._agreement.gather(whole and self._may_go_on()))
            self._folder = self._output_dir / f"checkpoint-{self._trainer.state.global_step}"
            self._trouble = None
            self._at_the_end = []
            behind = self._behind.capturing(self._in_words, self._give_up) if goes_on else contextlib.nullcontext()
            with self._forgiving(), behind, self._saved.recording():
                plain_save(*args, **kwargs)
                self._attempt(self._finish)(self._folder, self._saved)
                # Trainer has no barrier at the end of a save; this is one.
                failure = next((one for one in self._agreement.gather(self._trouble) if one is not None), None)
                if failure is not None and goes_on:
                    self._behind.forget()
            self._conclude(failure)

        SAVE_CHECKPOINT.set(self._trainer, save)

    def settle(self) -> bool:
        """Wait for the files of the newest save; return False if they could not be written and were removed."""
        self._behind.wait()
        return self._behind.take_error() is None

    def _in_words(self, error: BaseException) -> str:
        return str(self._explain(error).args[0])

    def _give_up(self, why: str) -> None:
        """Remove a failed save. Called from the writer thread, when no rank is writing any more."""
        if self._agreement.is_main:
            log_always(logging.ERROR, "%s; training goes on, and the next save will try again", why)
        if self._disk.leads:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _may_go_on(self) -> bool:
        """Return whether training may continue while the files of this save are written; all ranks must agree.

        False if the training ends anyway, or if something may read the files during the save or right after it.
        """
        trainer = self._trainer
        ends = trainer.control.should_training_stop or trainer.state.global_step >= trainer.state.max_steps
        read = trainer.args.push_to_hub or any(map(_reads_checkpoints, trainer.callback_handler.callbacks))
        known = all(map(_is_known, [(trainer, name) for name in _OF_A_SAVE] + [(trainer.model, "save_pretrained")]))
        return known and not (ends or read or trainer.is_deepspeed_enabled or self._behind.disconnected)

    def close(self) -> None:
        """Restore the trainer's method, after all files are written."""
        self.settle()
        SAVE_CHECKPOINT.restore(self._trainer)

    def _conclude(self, failure: SpotError | None) -> None:
        if failure is None:
            for act in self._at_the_end:
                self._behind.then(act)  # delete an older checkpoint only after the new one is complete
            self._best = self._best_now()
            return
        self._agreement.together(lambda: shutil.rmtree(self._folder, ignore_errors=True) if self._disk.leads else None)
        state = self._trainer.state
        if state.best_global_step == state.global_step:
            # The removed checkpoint can't be loaded at the end of the training.
            state.best_metric, state.best_global_step, state.best_model_checkpoint = self._best
        self._suppress_on_save()
        self._failed(failure)

    def _best_now(self) -> tuple[Any, Any, Any]:
        state = self._trainer.state
        return state.best_metric, state.best_global_step, state.best_model_checkpoint

    def _suppress_on_save(self) -> None:
        """Suppress the ``on_save`` event that Trainer sends next: callbacks would look for the folder."""
        handler = self._trainer.callback_handler

        def on_save(args: Any, state: Any, control: TrainerControl) -> TrainerControl:
            ON_SAVE.restore(handler)
            control.should_save = False
            return control

        if ON_SAVE.trouble() is None:
            ON_SAVE.set(handler, on_save)

    # -- during a save ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        """Hold errors of functions that only write, and postpone what should follow a save, within the block.

        The rest of Trainer's save may be a collective, and is not changed.
        """
        trainer, state = self._trainer, self._trainer.state
        self._saving = threading.get_ident()
        with contextlib.ExitStack() as undo:
            for owner, name, wrap in (
                (trainer, SAVE, self._attempt),
                (trainer, SAVE_RNG_STATE, self._attempt),
                (state, SAVE_STATE, self._attempt),
                (torch, TORCH_SAVE, self._attempt),
                (torch.distributed.checkpoint, SAVE_TOGETHER, self._attempt_together),
                (trainer, PUSH_FROM_CHECKPOINT, self._postpone),
                (transformers.trainer, ROTATE, self._postpone),
            ):
                undo.enter_context(name.replaced(owner, wrap))
            try:
                yield
            finally:
                self._saving = None

    def _attempt(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(*args: Any, **kwargs: Any) -> Any:
            if self._saving != threading.get_ident():
                return write(*args, **kwargs)
            if self._trouble is not None:
                return None
            return self._note_trouble(write, *args, **kwargs)

        return attempt

    def _attempt_together(self, write: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a collective, which raises on all ranks and must be called by all, even after an error."""
        return lambda *args, **kwargs: self._note_trouble(write, *args, **kwargs)

    def _note_trouble(self, write: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return write(*args, **kwargs)
        except (Exception, CheckpointException) as error:
            if not is_of_a_disk(error):
                raise
            # As text only: the error's traceback would keep half-written files open and their disk space in use.
            self._trouble = self._trouble or self._explain(error)
            return None

    def _postpone(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def follow(*args: Any, **kwargs: Any) -> None:
            try:
                act(*args, **kwargs)
            except Exception as error:
                self._hold(f"what follows the save ({getattr(act, '__name__', 'a function')})", error)

        return lambda *args, **kwargs: self._at_the_end.append(lambda: follow(*args, **kwargs))

    def _explain(self, error: BaseException) -> SpotError:
        return SpotError(
            f"{self._folder.name} can't be saved: {in_words(error, self._output_dir)}; "
            f"{os.uname().nodename}:{self._output_dir} has {free_gb(self._output_dir)}",
            hint=f"df -h {self._output_dir}; free some space, or lower TrainingArguments(save_total_limit=…), and start the "
            "same command again to resume from the newest commit. To continue without this checkpoint: --on-save-error go-on",
        )


def is_sharded(trainer: Trainer) -> bool:
    """Return whether each rank writes a part of the weights, rather than rank 0 all of them."""
    return trainer.is_fsdp_enabled and "FULL" not in str(trainer.accelerator.state.fsdp_plugin.state_dict_type)


def _size_bytes(model: Any, *, here: bool) -> int:
    """Estimate the size of a checkpoint: the saved weights, and AdamW's two moments of each trained weight.

    Args:
        model: the model.
        here: count only what this rank holds.
    """
    weights = list(model.parameters())
    trained = [one for one in weights if one.requires_grad]
    saved = trained if PEFT_CONFIG.is_on(model) else weights
    return sum((one.to_local() if here and hasattr(one, "to_local") else one).nbytes for one in saved + 2 * trained)


def _is_known(method: tuple[Any, str]) -> bool:
    """Return whether a method is defined by a library whose methods only write; a script's own may read its files."""
    owner, name = method
    definer = next((kind for kind in type(owner).__mro__ if name in vars(kind)), None)
    return definer is None or definer.__module__.partition(".")[0] in _ONLY_WRITE


def _reads_checkpoints(callback: TrainerCallback) -> bool:
    kind = type(callback)
    overrides = getattr(callback.on_save, "__func__", None) is not TrainerCallback.on_save
    if not overrides or kind.__module__.startswith(("hf_spot.", "transformers.trainer_callback")):
        return False
    if kind.__name__ == "WandbCallback":
        return (
            not WANDB_LOGS_MODEL.is_on(callback)
            or str(getattr(WANDB_LOGS_MODEL.of(callback), "value", "checkpoint")) == "checkpoint"
        )
    return kind.__name__ != "TrackioCallback"
