"""Saves that fail because of a disk: all ranks learn of it, and the incomplete checkpoint is removed."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import shutil
import threading
import time
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
from hf_spot.policy.hangs import Phase
from hf_spot.training.ranks.agreement import Agreement
from hf_spot.training.ranks.disks import Disk
from hf_spot.training.saving.async_writer import AsyncCheckpointWriter
from hf_spot.training.saving.disk_errors import free_gb, in_words, is_of_a_disk
from hf_spot.training.saving.finite import not_finite, optimizer_states, trained_weights
from hf_spot.training.session.phases import Phases
from hf_spot.training.trainer.engines import why_written_at_once
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
)

log = logging.getLogger("hf_spot")


_OF_A_SAVE = tuple(one.name for one in (SAVE_CHECKPOINT, SAVE_MODEL, SAVE, SAVE_OPTIMIZER))
# Libraries whose methods write files, and don't read them again.
_ONLY_WRITE = ("transformers", "trl", "sentence_transformers", "peft")
_WORTH_A_LINE_S = 0.0005


class Saves:
    """Replaces ``trainer._save_checkpoint`` from `watch` to `close`.

    A rank that can't write continues with the save as if it could, because other ranks may wait for it in a collective. At
    the end all ranks know: if one could not write, each disk's part of the folder is removed, no older checkpoint is rotated
    away, nothing is pushed to the Hub, and no callback is told of a save.

    Args:
        trainer: the Trainer.
        output_dir: where this training's checkpoints are written.
        agreement: agreement of its ranks.
        disk: the disk that this rank writes to.
        behind: writes the files while training continues.
        finish: writes what Trainer does not save, on every rank; called with the folder and the tensors written so far.
        failed: called on every rank after a failed save. An exception from it ends the training.
        refused: called on every rank instead of a save, with the names of what is not finite on any of them. An exception from
            it ends the training.
        hold: called with an exception from what follows a save (a push to the Hub, the rotation of older checkpoints), perhaps
            by the writer thread. The checkpoint is complete, and is committed before the training learns of it.
        phases: told of saves.
    """

    def __init__(
        self,
        trainer: Trainer,
        output_dir: Path,
        agreement: Agreement,
        disk: Disk,
        behind: AsyncCheckpointWriter,
        finish: Callable[[Path, SavedTensors], None],
        failed: Callable[[SpotError], None],
        refused: Callable[[list[str]], None],
        hold: Callable[[str, Exception], None],
        phases: Phases,
    ) -> None:
        self._trainer = trainer
        self._agreement = agreement
        self._disk = disk
        self._behind = behind
        self._finish = finish
        self._saved = SavedTensors(trainer)
        self._failed = failed
        self._refused = refused
        self._never_finite: frozenset[str] = frozenset()
        self._hold = hold
        self._phases = phases
        self._output_dir = output_dir
        self._trouble: SpotError | None = None
        self._folder = self._output_dir
        self._saving: int | None = None  # the thread
        self._at_the_end: list[Callable[[], None]] = []
        self._best: tuple[Any, Any, Any] = (None, None, None)
        self._told: set[str] = set()

    def watch(self) -> None:
        """Start replacing. Call it when the training's state is complete."""
        self._best = self._best_now()
        self._never_finite = frozenset(not_finite(trained_weights(self._trainer.model))[0])
        if self._never_finite:
            first = min(self._never_finite)
            self._tell(first, f"{first} is not finite before the first step: {len(self._never_finite)} weights are not checked")
        if self._why_at_once() is None and (self._agreement.is_main or writes_on_each_rank(self._trainer)):
            here = writes_on_each_rank(self._trainer)
            self._behind.expect(_size_bytes(self._trainer.model, here=here))
        plain_save = SAVE_CHECKPOINT.of(self._trainer)

        def save_now(*args: Any, **kwargs: Any) -> None:
            began = time.monotonic()
            whole = self.settle()
            if wrong := self._wrong_numbers():
                self._forget_best()
                self._suppress_on_save()
                self._refused(wrong)
                return
            # After a failed save, write at once, so that an error is found where it happens.
            reasons = self._agreement.gather(self._why_at_once() if whole else "")
            why = next((one for one in reasons if one is not None), None)
            goes_on = why is None
            self._folder = self._output_dir / f"checkpoint-{self._trainer.state.global_step}"
            self._trouble = None
            self._at_the_end = []
            touched = self._tell_touch if self._is_watched() else None
            behind = self._behind.capturing(self._in_words, self._give_up, touched) if goes_on else contextlib.nullcontext()
            with self._forgiving(), behind, self._saved.recording():
                self._save(plain_save, *args, **kwargs)
                self._attempt(self._finish)(self._folder, self._saved)
                # Trainer has no barrier at the end of a save; this is one.
                failure = next((one for one in self._agreement.gather(self._trouble) if one is not None), None)
                if failure is not None and goes_on:
                    self._behind.forget()
            if why and failure is None:
                took_s = time.monotonic() - began
                self._tell(why, f"training waited {took_s:.2g} s until {self._folder.name} was written, because {why}")
            self._conclude(failure)

        def save(*args: Any, **kwargs: Any) -> None:
            with self._phases.within(Phase.SAVING):
                save_now(*args, **kwargs)

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

    def _why_at_once(self) -> str | None:
        """Return why training must wait while this save is written; None if it needn't. All ranks must agree.

        An empty reason is not worth a line: the training ends anyway, or why was said.
        """
        trainer = self._trainer
        if trainer.control.should_training_stop or trainer.state.global_step >= trainer.state.max_steps:
            return ""
        if self._behind.disconnected:
            return ""
        if trainer.args.push_to_hub:
            return "push_to_hub=True pushes each checkpoint right after its save"
        if (own := self._own_method()) is not None and is_sharded(trainer):
            return f"{own} may read shards, which the ranks can only write together"
        return why_written_at_once(trainer)

    def _own_method(self) -> str | None:
        """Return which method of a save is a script's own; None if all are of libraries that only write."""
        saves = [(self._trainer, name) for name in _OF_A_SAVE] + [(self._trainer.model, "save_pretrained")]
        return next((f"{type(owner).__name__}.{name}" for owner, name in saves if not _is_known(owner, name)), None)

    def _is_watched(self) -> bool:
        """Return whether code that may touch the files takes part in a save, or is told of it.

        Trainer itself removes a file that it has just saved with DeepSpeed.
        """
        return (
            self._trainer.is_deepspeed_enabled
            or self._own_method() is not None
            or any(map(_is_told, self._trainer.callback_handler.callbacks))
        )

    def _save(self, plain_save: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Save as Trainer does.

        The script's own code may fail without a file that could not be written. In a training of one rank that file counts;
        other ranks would wait for this one in a collective.
        """
        try:
            plain_save(*args, **kwargs)
        except Exception as error:
            if not self._agreement.alone or not (self._trouble is not None or self._behind.failed):
                raise
            self._trouble = self._trouble or self._explain(error)
        if self._trouble is None and self._trainer.args.should_save and not self._folder.is_dir():
            self._trouble = SpotError(
                f"{self._folder.name} has disappeared during its save: {self._own_method() or 'other code'} has moved it",
                hint=f"leave the checkpoint in {self._output_dir}, and copy it instead: hf_spot commits what it finds there",
            )

    def _tell_touch(self, code: str, touch: str, waited_s: float) -> None:
        if waited_s >= _WORTH_A_LINE_S:
            self._tell(code, f"{code} {touch} of {self._folder.name}, so training waited {waited_s:.2g} s for its files")

    def _tell(self, why: str, line: str) -> None:
        """Say once for each reason why training waited for the files of a save."""
        if why not in self._told and self._agreement.is_main:
            log.warning("%s; said once", line)
        self._told.add(why)

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
        self._forget_best()
        self._suppress_on_save()
        self._failed(failure)

    def _forget_best(self) -> None:
        state = self._trainer.state
        if state.best_global_step == state.global_step:
            # A checkpoint that does not exist can't be loaded at the end of the training.
            state.best_metric, state.best_global_step, state.best_model_checkpoint = self._best

    def _wrong_numbers(self) -> list[str]:
        """Return the names of what is not finite on any rank. All ranks must call it."""
        trainer = self._trainer
        named = itertools.chain(trained_weights(trainer.model), optimizer_states(trainer.optimizer))
        wrong, unknown = not_finite((name, value) for name, value in named if name not in self._never_finite)
        if unknown:
            self._tell("unknown", f"{unknown[0]} and {len(unknown) - 1} others can't be checked for NaN")
        newest = trainer.state.log_history[-1] if trainer.state.log_history else {}
        loss = newest.get("loss")
        if newest.get("step") == trainer.state.global_step and isinstance(loss, float) and not math.isfinite(loss):
            wrong.append("the logged loss")
        return [name for found in self._agreement.gather(wrong) for name in found]

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
    """Return whether the ranks write the weights together, rather than rank 0 all of them."""
    return trainer.is_fsdp_enabled and "FULL" not in str(trainer.accelerator.state.fsdp_plugin.state_dict_type)


def writes_on_each_rank(trainer: Trainer) -> bool:
    """Return whether each rank writes much of a checkpoint, rather than rank 0 all of it."""
    return trainer.is_deepspeed_enabled or is_sharded(trainer)


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


def _is_known(owner: Any, name: str) -> bool:
    """Return whether a method is defined by a library whose methods only write; a script's own may read its files."""
    definer = next((kind for kind in type(owner).__mro__ if name in vars(kind)), None)
    return definer is None or definer.__module__.partition(".")[0] in _ONLY_WRITE


def _is_told(callback: TrainerCallback) -> bool:
    """Return whether a callback that hf_spot doesn't know is told of saves."""
    overrides = getattr(callback.on_save, "__func__", None) is not TrainerCallback.on_save
    return overrides and not type(callback).__module__.startswith(("hf_spot.", "transformers.trainer_callback"))
