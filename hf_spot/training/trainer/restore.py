"""Finds what Trainer resumes from: the run's newest commit, restored to ``output_dir``, or a checkpoint from before hf_spot."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, TrainOutput

from hf_spot.errors import SpotError
from hf_spot.run.checkpoint import Checkpoint
from hf_spot.run.output_folder import enter, foreign_checkpoints, set_aside_uncommitted
from hf_spot.training.session.run_session import RunSession
from hf_spot.training.trainer.log_window import LogWindow
from hf_spot.training.trainer.resumed_events import is_of_the_script, weights_kept
from hf_spot.training.trainer.weights import all_weights_loaded
from hf_spot.training.upstream import (
    BEST_METRIC,
    CALLBACK_HANDLER,
    CALLBACKS,
    EVALUATE,
    LOAD_BEST_MODEL,
    LOAD_FROM_CHECKPOINT,
    LOAD_OPTIMIZER,
    LOAD_RNG_STATE,
    ON_EPOCH_END,
    ON_TRAIN_BEGIN,
    ON_TRAIN_END,
    PREPARE,
    PREPARED_MODELS,
)
from hf_spot.training.upstream.name import Name

log = logging.getLogger("hf_spot")


class MachineGoing(Exception):
    """The machine is being taken away: ends a start before any training."""


class Resumption:
    """Restores checkpoints for Trainer. Every rank must call every method.

    A termination notice ends a restore with `MachineGoing`.

    Args:
        session: connection to the run, which must be claimed.
    """

    def __init__(self, session: RunSession) -> None:
        self._session = session
        self._run = session.run
        self._output_dir = session.output_dir

    def restore(self, resume_from_checkpoint: str | bool | None) -> tuple[Checkpoint, Path] | None:
        """Restore the newest commit of this training, and set aside local checkpoints that were never committed.

        Args:
            resume_from_checkpoint: as given to ``train()``; False restores nothing.

        Raises:
            CorruptCheckpoint: there are commits, but none is intact.
            StoreError: the store could not be read.
        """
        session, found = self._session, None
        keep = _names_one_of(resume_from_checkpoint, self._output_dir)
        session.on_each_disk(lambda: enter(self._run, self._output_dir, keep=keep))
        if resume_from_checkpoint is not False:
            found = session.restore_newest(self._check_notice)
        step = found[0].step if found else 0
        session.on_each_disk(lambda: set_aside_uncommitted(self._run, self._output_dir, step, session.training))
        return found

    def foreign(self, resume_from_checkpoint: Any) -> Any:
        """Return what Trainer should resume from if the run has no commit: a checkpoint that hf_spot did not make, or None."""
        return self._session.agreement.from_main(lambda: self._foreign(resume_from_checkpoint))

    def _foreign(self, resume_from_checkpoint: Any) -> Any:
        if resume_from_checkpoint in (None, False):
            return None
        if not _names_one_of(resume_from_checkpoint, self._output_dir):
            return resume_from_checkpoint
        foreign = foreign_checkpoints(self._output_dir)
        found = bool(foreign) if resume_from_checkpoint is True else Path(resume_from_checkpoint).name in foreign
        return resume_from_checkpoint if found else None

    def restore_best(self, restored: Checkpoint) -> Path | None:
        """Restore the best checkpoint so far and return its folder; None if there is none, or it can't be restored.

        Args:
            restored: the checkpoint that the training resumes from, which may be the best one.
        """
        session = self._session
        if restored.ref.best:
            return self._output_dir / restored.name
        bests = [ref for ref in self._run.journal.state.checkpoints if ref.training == session.training and ref.best]
        best = session.agreement.from_main(lambda: bests[0] if bests else None)
        if best is None:
            return None
        resumed = self._output_dir / restored.name
        if best.step == restored.step:
            return resumed
        try:
            _, folder = session.restore(best, "restore best", self._check_notice)
        except SpotError as error:
            if session.agreement.is_main:
                log.error("the best checkpoint so far can't be restored, so a later one will count as the best: %s", error)
            return None
        # Trainer's rotation goes by modification time, and must treat the checkpoint to resume from as the newer one.
        session.on_each_disk(lambda: _touch(resumed))
        return folder

    def _check_notice(self) -> None:
        if self._session.listener.termination() is not None:
            raise MachineGoing


def _touch(folder: Path) -> None:
    with contextlib.suppress(PermissionError, NotImplementedError):  # mounted buckets have no modification times
        os.utime(folder)


def _names_one_of(resume_from_checkpoint: str | bool | None, output_dir: Path) -> bool:
    """Return whether a script resumes from a checkpoint in its output folder, as ``get_last_checkpoint`` finds one."""
    if isinstance(resume_from_checkpoint, str):
        return Path(resume_from_checkpoint).resolve().parent == output_dir.resolve()
    return resume_from_checkpoint is True


def load_finished(
    trainer: Trainer,
    folder: Path,
    restored: Checkpoint,
    best_folder: Path | None,
    restore_own: Callable[[Path], object],
    set_up_trackers: Callable[[], None],
    *,
    told: bool,
    trial: Any = None,
) -> TrainOutput:
    """Bring the trainer into the state after a finished ``train()``, without training: Trainer itself would do one more step.

    Args:
        trainer: the Trainer.
        folder: folder of the last checkpoint.
        restored: the last checkpoint.
        best_folder: folder of the best checkpoint, if there is one.
        restore_own: restores state that Trainer does not save, from a folder.
        set_up_trackers: sets up the callbacks of trackers, if they get the last log lines.
        told: whether callbacks already got the training's last log lines.
        trial: of a hyperparameter search, which is told about an evaluation that is made up for.
    """
    if not trainer.is_deepspeed_enabled:
        with all_weights_loaded(trainer):
            LOAD_FROM_CHECKPOINT.of(trainer)(str(folder))
    args, window = trainer.args, LogWindow(trainer)
    state = trainer.state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
    state.is_local_process_zero, state.is_world_process_zero = trainer.is_local_process_zero(), trainer.is_world_process_zero()
    if trainer.is_deepspeed_enabled:  # its checkpoint can only be loaded into its engine
        PREPARE.of(trainer)(state.max_steps, trainer.get_train_dataloader(), str(folder))
    scripts_own = [one for one in CALLBACKS.of(CALLBACK_HANDLER.of(trainer)) if is_of_the_script(one)]
    _prepare(trainer)
    _restore_optimizer(trainer, folder)
    with weights_kept(trainer, folder):
        _tell(scripts_own, trainer, ON_TRAIN_BEGIN)
    restore_own(folder)
    reported = window.load_finished(folder)
    if not told:
        set_up_trackers()
    LOAD_RNG_STATE.of(trainer)(str(folder))
    with _callbacks_removed(trainer) if told else contextlib.nullcontext():
        pending, at_epoch_end = restored.details.get("evaluation_pending"), args.eval_strategy == IntervalStrategy.EPOCH
        if pending and not at_epoch_end:
            _evaluate(trainer, trial)
        if not restored.details.get("pass", {}).get("end_was_told", True):
            _tell(scripts_own, trainer, ON_EPOCH_END)
        window.make_up()
        if pending and at_epoch_end:
            _evaluate(trainer, trial)
        output = window.summarize() if reported else None
    # Trainer notes where the best model is when it saves: not at all, or before the evaluation at the end of an epoch.
    is_noted = args.save_strategy != SaveStrategy.NO and not (at_epoch_end and args.save_strategy == SaveStrategy.STEPS)
    if pending and is_noted and state.best_global_step == restored.step:
        best_folder = folder
        state.best_model_checkpoint = str(folder)
    if args.load_best_model_at_end and best_folder is not None:
        state.best_model_checkpoint = str(best_folder)
        LOAD_BEST_MODEL.of(trainer)()
    _tell(scripts_own, trainer, ON_TRAIN_END)
    if output is not None:
        return output
    losses = [line["loss"] for line in state.log_history if "loss" in line]
    return TrainOutput(state.global_step, sum(losses) / len(losses) if losses else 0.0, {})


def _tell(scripts_own: list[TrainerCallback], trainer: Trainer, event: Name) -> None:
    """Send an event to the script's own callbacks: they may leave something that the script uses after the training.

    Not if the model is sharded, because there is no optimizer then, which they may expect.
    """
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return
    handler = CALLBACK_HANDLER.of(trainer)
    handler.model, handler.optimizer, handler.lr_scheduler = trainer.model, trainer.optimizer, trainer.lr_scheduler
    present = list(CALLBACKS.of(handler))
    CALLBACKS.of(handler)[:] = scripts_own
    try:
        event.of(handler)(trainer.args, trainer.state, trainer.control)
    finally:
        CALLBACKS.of(handler)[:] = present


def _prepare(trainer: Trainer) -> None:
    """Bring the model into the state that a training leaves it in.

    It is in ``train()`` mode unless it was evaluated last, and prepared by accelerate, so that no later evaluation reports the
    time for that.
    """
    model, state = trainer.model, trainer.state
    assert model is not None
    model.train(not any(_is_of_evaluation(line) for line in state.log_history if line.get("step") == state.global_step))
    if (
        trainer.is_deepspeed_enabled
        or trainer.is_fsdp_enabled
        or trainer.args.torch_compile
        or any(trainer.accelerator.unwrap_model(one) is model for one in PREPARED_MODELS.of(trainer.accelerator))
    ):
        return
    prepared = trainer.accelerator.prepare_model(model, evaluation_mode=True)
    if prepared is not model:
        trainer.model_wrapped = prepared


def _restore_optimizer(trainer: Trainer, folder: Path) -> None:
    """Restore optimizer and schedule: a second ``train()`` of the same Trainer continues with this optimizer."""
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:  # they create theirs together with the sharded model
        return
    trainer.create_optimizer()
    trainer.optimizer = trainer.accelerator.prepare(trainer.optimizer)
    trainer.create_scheduler(num_training_steps=trainer.state.max_steps)
    LOAD_OPTIMIZER.of(trainer)(str(folder))


def _is_of_evaluation(line: dict[str, float]) -> bool:
    return any(key.startswith("eval_") for key in line)


def _evaluate(trainer: Trainer, trial: Any) -> None:
    metrics = EVALUATE.of(trainer)(trial, None)  # which also steps a schedule that follows the metric
    BEST_METRIC.of(trainer)(metrics=metrics, trial=trial)


@contextlib.contextmanager
def _callbacks_removed(trainer: Trainer) -> Iterator[None]:
    """Remove callbacks within the block, because they got these events already.

    Trainer's own callbacks for its flow and the terminal stay: they also decide what ``train()`` returns.
    """
    callbacks = CALLBACKS.of(CALLBACK_HANDLER.of(trainer))
    before = list(callbacks)
    callbacks[:] = [one for one in before if type(one).__module__ == TrainerCallback.__module__]
    try:
        yield
    finally:
        callbacks[:] = before
