"""Saves that fail because of a disk: all ranks learn of it, and the incomplete checkpoint is removed."""

from __future__ import annotations

import contextlib
import functools
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
from hf_spot.policy import numbers
from hf_spot.policy.hangs import Phase
from hf_spot.run.output_folder import discard_own_saves, own_save
from hf_spot.training.ranks.agreement import Agreement
from hf_spot.training.ranks.disks import Disk
from hf_spot.training.saving.async_writer import AsyncCheckpointWriter, Refusal
from hf_spot.training.saving.disk_errors import free_gb, in_words, is_of_a_disk
from hf_spot.training.saving.finite import not_finite, optimizer_states, trained_weights
from hf_spot.training.saving.later_copies import LaterCopies
from hf_spot.training.saving.live_tensors import LiveTensors, versions_of, weights_written_since
from hf_spot.training.session.phases import Phases
from hf_spot.training.trainer.engines import why_written_at_once
from hf_spot.training.trainer.model_files import ModelFiles
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
    TRIAL_FOLDER,
)

log = logging.getLogger("hf_spot")


_OF_A_SAVE = tuple(one.name for one in (SAVE_CHECKPOINT, SAVE_MODEL, SAVE, SAVE_OPTIMIZER))
# Libraries whose methods write files, and don't read them again.
_ONLY_WRITE = ("transformers", "trl", "sentence_transformers", "peft")
_WORTH_A_LINE_S = 0.0005


class _Unanswered:
    """A save whose copies are checked for NaN beside the training.

    Args:
        step: the step that is saved.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self.later: LaterCopies | None = None
        self.names: dict[int, str] = {}  # by the addresses of the tensors
        self.found: list[str] = []  # what was checked at once

    def wrong(self) -> list[str]:
        """Return the names of what is not finite, as far as it is known."""
        return [*self.found, *self._named([] if self.later is None else self.later.not_finite)]

    def unknown(self) -> list[str]:
        """Return the names of what can't be checked."""
        return self._named([] if self.later is None else self.later.unknown)

    def _named(self, addresses: list[int]) -> list[str]:
        return [self.names[one] for one in addresses if one in self.names]


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
        refused: called on every rank instead of a save, or within the step after it, with the names of what is not finite on
            any of them, and the step that would have been saved. An exception from it ends the training.
        opened: called with the seconds that the training waited, after a save, for copies that are made beside it.
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
        refused: Callable[[list[str], int], None],
        opened: Callable[[float], None],
        hold: Callable[[str, Exception], None],
        phases: Phases,
    ) -> None:
        self._trainer = trainer
        self._agreement = agreement
        self._disk = disk
        self._behind = behind
        self._finish = finish
        self._saved = SavedTensors(trainer)
        self._model_files = ModelFiles(trainer, behind, self._saved.note, self._say)
        self._failed = failed
        self._is_ours = self._is_adding = self._can_add = self._is_good = False
        self._newest_step = -1
        self._size_bytes = 0
        self._own_step_before = 0
        self._refused = refused
        self._opened = opened
        self._unanswered: _Unanswered | None = None
        self._asked: _Unanswered | None = None  # of the newest save, also once it is answered
        self._why_not_beside: str | None = None
        self._versions: dict[str, int] | None = None
        self._is_first_step = True
        self._never_finite: frozenset[str] = frozenset()
        self._hold = hold
        self._phases = phases
        self._output_dir = output_dir
        self._trouble: SpotError | None = None
        self._folder = self._output_dir
        self._saving: int | None = None  # the thread
        self._at_the_end: list[Callable[[], None]] = []
        self._best: tuple[Any, Any, Any] = (None, None, None)
        self._best_before = self._best
        self._told: set[str] = set()

    def watch(self) -> None:
        """Start replacing. Call it when the training's state is complete."""
        self._best = self._best_now()
        self._never_finite = frozenset(not_finite(trained_weights(self._trainer.model))[0])
        if self._never_finite:
            first = min(self._never_finite)
            self._tell(first, f"{first} is not finite before the first step: {len(self._never_finite)} weights are not checked")
        self._size_bytes = _size_bytes(self._trainer.model, here=writes_on_each_rank(self._trainer))
        if self._why_at_once() is None and (self._agreement.is_main or writes_on_each_rank(self._trainer)):
            self._behind.expect(self._size_bytes)
        plain_save = SAVE_CHECKPOINT.of(self._trainer)
        self._behind.gate.watch_steps()
        can_add = TRIAL_FOLDER.trouble() is None and _is_known(self._trainer, SAVE_CHECKPOINT.name)
        self._can_add = all(self._agreement.gather(can_add))

        def save_now(*args: Any, **kwargs: Any) -> None:
            began = time.monotonic()
            self._is_ours = self._is_adding
            whole = self.settle()
            self.answer()
            # After a failed save, write at once, so that an error is found where it happens.
            known_here = self._why_at_once() if whole else "", self._why_copied_at_once()
            reasons = self._agreement.gather(known_here)
            why = next((one for one, _ in reasons if one is not None), None)
            goes_on, why_at_once = why is None, next((one for _, one in reasons if one is not None), None)
            if goes_on and why_at_once and why_at_once not in self._told:
                self._told.add(why_at_once)
                log.info("training waits while a save copies its state, because %s; said once", why_at_once)
            live = self._live_tensors() if goes_on and why_at_once is None else None
            beside = any(self._agreement.gather(live is not None))
            if wrong := self._wrong_numbers(of_loss_only=beside):
                self._forget_best(self._trainer.state.global_step)
                self._suppress_on_save()
                self._refused(wrong, self._trainer.state.global_step)
                return
            step = self._newest_step = self._trainer.state.global_step
            self._folder = own_save(self._output_dir, step) if self._is_ours else self._output_dir / f"checkpoint-{step}"
            self._trouble = None
            self._at_the_end = []
            touched = self._tell_touch if self._is_watched() else None
            asked = _Unanswered(self._trainer.state.global_step)
            behind = (
                self._behind.capturing(
                    self._in_words, self._give_up, touched, live, self._opened, functools.partial(self._judge, asked)
                )
                if goes_on
                else contextlib.nullcontext()
            )
            self._asked = asked if beside else None
            later = self._model_files.taken_over() if goes_on else contextlib.nullcontext()
            with self._forgiving(), self._placed(self._folder.parent), behind, self._saved.recording(), later:
                self._save(plain_save, *args, **kwargs)
                self._attempt(self._finish)(self._folder, self._saved)
                if live is not None:
                    self._examine(asked)
                # Trainer has no barrier at the end of a save; this is one.
                failure = next((one for one in self._agreement.gather(self._trouble) if one is not None), None)
                if failure is not None and goes_on:
                    self._behind.forget()
            if why and failure is None:
                took_s = time.monotonic() - began
                self._tell(why, f"training waited {took_s:.2g} s until {self._folder.name} was written, because {why}")
            if beside and failure is None:
                self._unanswered = asked
            self._conclude(failure)

        def save(*args: Any, **kwargs: Any) -> None:
            with self._phases.within(Phase.SAVING):
                save_now(*args, **kwargs)

        SAVE_CHECKPOINT.set(self._trainer, save)

    @property
    def folder(self) -> Path:
        """Return the folder of the newest save."""
        return self._folder

    @property
    def is_known_finite(self) -> bool:
        """Return whether all numbers of the newest save are examined before it is committed, on this rank."""
        return not self._never_finite and "unknown" not in self._told

    @property
    def is_ours(self) -> bool:
        """Return whether Trainer has not asked for the newest save."""
        return self._is_ours

    def remove_newest(self) -> None:
        """Remove the files of the newest save, whose step is saved again. What is to be uploaded has links of its own.

        Every rank must call it, and then save.
        """
        self.settle()
        if self._disk.leads:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def newest_step(self) -> int:
        """Return the step of the newest save in this launch, also of one that has failed; -1 for none."""
        return self._newest_step

    @property
    def size_bytes(self) -> int:
        """Return about how large a save of this rank is."""
        return self._size_bytes

    @property
    def can_add(self) -> bool:
        """Return whether `add` may be called: a script's own ``_save_checkpoint`` may do more than save."""
        return self._can_add

    def add(self, model: Any, trial: Any) -> bool:
        """Save the state as it is, although Trainer has not asked for it; return whether that succeeded.

        The save has a place of its own, and rotation, pushes to the Hub and other callbacks don't learn of it. Every rank must
        call it after the same step, once Trainer has made its own saves of that step.

        Args:
            model: as Trainer passes it to ``_save_checkpoint``.
            trial: likewise.
        """
        self._is_adding, self._is_good = True, False
        try:
            SAVE_CHECKPOINT.of(self._trainer)(model, trial)
        finally:
            self._is_adding = False
        return self._is_good

    def settle(self) -> bool:
        """Wait for the files of the newest save; return False if they could not be written and were removed."""
        self._behind.wait()
        error = self._behind.take_error()
        if error is not None and self._unanswered is not None:
            self._forget_best(self._unanswered.step)
        return error is None or isinstance(error, Refusal)

    def step_begins(self) -> None:
        """Record that a step begins. The first one shows whether something else than an optimizer changes weights."""
        self._behind.gate.step_begins()
        if self._is_first_step and self._trainer.model is not None:
            self._versions = versions_of(self._trainer.model)

    def step_changes_weights(self) -> None:
        """Return when the weights may change, because the optimizer's step comes next."""
        self._behind.gate.pass_through()
        if self._is_first_step:
            self._is_first_step, before = False, self._versions or {}
            model: Any = self._trainer.model
            if written := weights_written_since(model, before):
                self._why_not_beside = f"{written[0]} is written to before the optimizer's step"
            self._versions = None

    def step_ended(self) -> None:
        """Look whether the newest save was good. Every rank must call it after each step."""
        self._behind.gate.pass_through()
        self.answer(waits=False)

    def event_comes(self, event: str) -> None:
        """Return when callbacks that hf_spot doesn't know may change weights in an event."""
        if self._behind.gate.is_shut:
            callbacks = self._trainer.callback_handler.callbacks
            if any(_overrides(one, event) and not _is_of_library(one) for one in callbacks):
                self._behind.gate.pass_through()

    def answer(self, *, waits: bool = True) -> None:
        """Refuse the newest save, if its copies turn out to have numbers that are not finite. Every rank must call it.

        Args:
            waits: for the answer; else a training of one rank may get it later.
        """
        asked = self._unanswered
        if asked is None or not (waits or not self._agreement.alone or self._is_known(asked)):
            return
        while not self._is_known(asked, 0.05) and not self._behind.wait(0.0):
            pass
        self._unanswered = None
        wrong = [name for found in self._agreement.gather(asked.wrong()) for name in found]
        if asked.unknown():
            self._tell_unknown(asked.unknown())
        if wrong:
            self._forget_best(asked.step)
            self._refused(wrong, asked.step)

    @staticmethod
    def _is_known(asked: _Unanswered, timeout_s: float = 0.0) -> bool:
        return asked.later is None or asked.later.is_checked(timeout_s)

    def _in_words(self, error: BaseException) -> str:
        return str(self._explain(error).args[0])

    def _give_up(self, why: str) -> None:
        """Remove a failed save. Called from the writer thread, when no rank is writing any more."""
        asked = self._asked  # it may have been answered a moment ago
        if self._agreement.is_main and not (asked is not None and asked.wrong()):  # else `answer` says so
            log_always(logging.ERROR, "%s; training goes on, and the next save will try again", why)
        self._remove()

    def _remove(self) -> None:
        if self._disk.leads:
            shutil.rmtree(self._folder.parent if self._is_ours else self._folder, ignore_errors=True)

    def _why_at_once(self) -> str | None:
        """Return why training must wait while this save is written; None if it needn't. All ranks must agree.

        An empty reason is not worth a line: the training ends anyway, or why was said.
        """
        trainer = self._trainer
        if trainer.control.should_training_stop or trainer.state.global_step >= trainer.state.max_steps:
            return ""
        if self._behind.disconnected:
            return ""
        if trainer.args.push_to_hub and not self._is_ours:
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
            or (not self._is_ours and any(map(_is_told, self._trainer.callback_handler.callbacks)))
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

    def _say(self, line: str) -> None:
        if self._agreement.is_main:
            log.info("%s; said once", line)

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
            self._best_before, self._best = self._best, self._best_now()
            self._is_good = True
            if self._is_ours:
                if self._disk.leads:  # a commit deletes them on its own disk alone
                    self._behind.then(functools.partial(discard_own_saves, self._output_dir, self._own_step_before))
                self._own_step_before = self._trainer.state.global_step
            return
        self._agreement.together(self._remove)
        self._forget_best(self._trainer.state.global_step)
        self._suppress_on_save()
        self._failed(failure)

    def _forget_best(self, step: int) -> None:
        """Forget that a step is the best one: a checkpoint that does not exist can't be loaded at the end of the training."""
        state = self._trainer.state
        if state.best_global_step == step:
            before = self._best_before if self._best[1] == step else self._best
            state.best_metric, state.best_global_step, state.best_model_checkpoint = self._best = before

    def _live_tensors(self) -> LiveTensors | None:
        """Return what may be copied beside the training; None if nothing may, or if this rank writes nothing."""
        if not (self._agreement.is_main or writes_on_each_rank(self._trainer)) or self._trainer.model is None:
            return None
        return LiveTensors(self._trainer.model, self._behind.gate.stepped()) or None

    def _why_copied_at_once(self) -> str | None:
        """Return why training must wait while the state is copied; None if it needn't. An empty reason is not worth a line."""
        trainer = self._trainer
        if trainer.args.device.type != "cpu":
            return ""  # copies from a device are queued in its order, and nobody waits for them
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            return "its parts are spread over the ranks"
        if (own := self._own_method()) is not None:
            return f"{own} may change weights"
        told = next(filter(_is_told_by_others, trainer.callback_handler.callbacks), None)
        if told is not None and not self._is_ours:
            return f"{type(told).__name__}.on_save may change weights, and is told of a save once that is known to be good"
        return self._why_not_beside

    def _examine(self, asked: _Unanswered) -> None:
        """Have all that can go wrong checked for NaN: the copies, in the writer thread, and what has none, at once."""
        named = [(name, value) for name, value in self._named_tensors() if name not in self._never_finite]
        asked.later, left = self._behind.examine(named)
        asked.found, unknown = not_finite(left)
        if unknown:
            self._tell_unknown(unknown)
        asked.names = {value.data_ptr(): name for name, value in named if value.layout is torch.strided}

    def _judge(self, asked: _Unanswered) -> str | None:
        """Return why a save must not be committed; None if it may. Called from the writer thread."""
        assert asked.later is not None
        if asked.later.written_to:
            names = [asked.names.get(one, "a weight that is not trained") for one in asked.later.written_to]
            self._why_not_beside = f"{names[0]} was written to between two steps"
            return (
                f"checkpoint-{asked.step} is not saved: {names[0]} was written to while it was copied, and not by a step of an "
                "optimizer; from now on training waits while its state is copied"
            )
        return numbers.in_words(wrong, asked.step) if (wrong := asked.wrong()) else None

    def _named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return itertools.chain(trained_weights(self._trainer.model), optimizer_states(self._trainer.optimizer))

    def _tell_unknown(self, unknown: list[str]) -> None:
        self._tell("unknown", f"{unknown[0]} and {len(unknown) - 1} others can't be checked for NaN")

    def _wrong_numbers(self, *, of_loss_only: bool) -> list[str]:
        """Return the names of what is not finite on any rank. All ranks must call it.

        Args:
            of_loss_only: the rest is checked on its copies.
        """
        trainer = self._trainer
        named = () if of_loss_only else self._named_tensors()
        wrong, unknown = not_finite((name, value) for name, value in named if name not in self._never_finite)
        if unknown:
            self._tell_unknown(unknown)
        newest = trainer.state.log_history[-1] if trainer.state.log_history else {}
        loss = newest.get("loss")
        if newest.get("step") == trainer.state.global_step and isinstance(loss, float) and not math.isfinite(loss):
            wrong.append("the logged loss")
        return [name for found in self._agreement.gather(wrong) for name in found]

    def _best_now(self) -> tuple[Any, Any, Any]:
        state = self._trainer.state
        return state.best_metric, state.best_global_step, state.best_model_checkpoint

    @contextlib.contextmanager
    def _placed(self, place: Path) -> Iterator[None]:
        """Have Trainer save to a folder in ``place`` within the block."""
        if place == self._output_dir:
            yield
            return
        with TRIAL_FOLDER.replaced(self._trainer, lambda plain: lambda *args, **kwargs: str(place)):
            yield

    def _suppress_on_save(self) -> None:
        """Suppress the ``on_save`` event that Trainer sends next, if it does: callbacks would look for the folder."""
        handler = self._trainer.callback_handler

        def on_save(args: Any, state: Any, control: TrainerControl) -> TrainerControl:
            ON_SAVE.restore(handler)
            control.should_save = False
            return control

        if ON_SAVE.trouble() is None and not self._is_ours:
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

        def postponed(*args: Any, **kwargs: Any) -> None:
            if not self._is_ours:
                self._at_the_end.append(lambda: follow(*args, **kwargs))

        return postponed

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
    is_known = type(callback).__module__.startswith(("hf_spot.", "transformers.trainer_callback"))
    return not is_known and _overrides(callback, "on_save")


def _is_told_by_others(callback: TrainerCallback) -> bool:
    return _is_told(callback) and not _is_of_library(callback)


def _is_of_library(callback: TrainerCallback) -> bool:
    """Return whether a callback is hf_spot's or transformers', whose callbacks report, and change no weights."""
    return type(callback).__module__.partition(".")[0] in ("hf_spot", "transformers")


def _overrides(callback: TrainerCallback, event: str) -> bool:
    """Return whether a callback does something in an event; also if it is no `TrainerCallback`."""
    own, plain = getattr(callback, event, None), getattr(TrainerCallback, event, None)
    return own is not None and (plain is None or getattr(own, "__func__", None) is not plain)
