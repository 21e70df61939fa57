"""Evaluations that a notice can end: the last two minutes of a machine are for the checkpoint."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState

from hf_spot.log import warn_for_all
from hf_spot.policy.hangs import Phase
from hf_spot.training.data.worker_processes import seeded_before
from hf_spot.training.session.phases import Phases
from hf_spot.training.trainer.log_window import LogWindow
from hf_spot.training.trainer.random_states import RandomStates
from hf_spot.training.upstream import (
    BEST_METRIC,
    EVALUATE,
    LOG_SAVE_EVALUATE,
    LOSS_SO_FAR,
    ON_EPOCH_END,
    ON_EVALUATE,
    RUN_EPOCH,
)


class _Cut(Exception):
    """Ends an evaluation from within."""


class Stopped(Exception):
    """Ends a resumed training before its first step, because the evaluation that was made up stops it early."""


class Evaluations:
    """Wraps a trainer's evaluations until `close`.

    An evaluation that is cut short leaves the random state, the log and the mode of the model as they were before it. The next
    launch makes up for it from that state.

    Args:
        trainer: the Trainer.
        random_states: of this training.
        log_window: of this training.
        when_cut: called after an evaluation was cut short; decides whether to save.
        resumed: the checkpoint of this run that the training resumes, or None.
        phases: told of evaluations.
        workers_known: whether the checkpoint tells what persistent workers of evaluations had reached.
    """

    def __init__(
        self,
        trainer: Trainer,
        random_states: RandomStates,
        log_window: LogWindow,
        when_cut: Callable[[], None],
        resumed: Path | None,
        phases: Phases,
        *,
        workers_known: bool = True,
    ) -> None:
        self._trainer = trainer
        self._random_states = random_states
        self._log_window = log_window
        self._when_cut = when_cut
        self._phases = phases
        self._workers_were_there = not workers_known and resumed is not None and workers_are_unknown(trainer, resumed)
        self._is_resumed = resumed is not None
        self.has_begun = False  # whether an epoch has begun: before that, Trainer evaluates only for ``eval_on_start``
        self._is_stopped = False  # before the first epoch of a resumed training
        self.was_cut = False
        self.running = False  # on all ranks at the same time, so that they can agree; not in evaluations that callbacks start
        self._on_evaluate = ON_EVALUATE.of(trainer.callback_handler)
        ON_EVALUATE.set(trainer.callback_handler, self._evaluated)
        EVALUATE.set(trainer, self._evaluate)
        BEST_METRIC.set(trainer, self._determine_best_metric)
        RUN_EPOCH.set(trainer, self._run_epoch)

    def cut(self) -> None:
        """End the evaluation under way. Call it from one of its events; it does not return."""
        raise _Cut

    def make_up(self, trial: Any) -> None:
        """Run the evaluation that a notice suppressed or cut short in the previous launch. Raises Stopped.

        Args:
            trial: of a hyperparameter search, or None.
        """
        metrics = EVALUATE.of(self._trainer)(trial, None)
        BEST_METRIC.of(self._trainer)(metrics=metrics, trial=trial)
        if self._trainer.control.should_training_stop and not self.was_cut:
            raise Stopped  # by EarlyStoppingCallback, for example; Trainer itself would look only after another step

    def begin(self) -> None:
        """Record that evaluations from now on are not the one of ``eval_on_start``."""
        self.has_begun = True

    def stop_before_epoch(self) -> None:
        """End the training as soon as Trainer begins an epoch, because `make_up` has raised `Stopped` before it."""
        self._is_stopped = True

    def close(self) -> None:
        """Restore the trainer's methods."""
        for name in (EVALUATE, BEST_METRIC, RUN_EPOCH):
            name.restore(self._trainer)
        ON_EVALUATE.restore(self._trainer.callback_handler)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self.has_begun = True
        plain_run = RUN_EPOCH.plain(self._trainer)
        try:
            if self._is_stopped:
                raise Stopped
            plain_run(*args, **kwargs)
        except Stopped:
            # What Trainer does after leaving its loop; the checkpoint must record that it is the last one.
            trainer = self._trainer
            trainer.control = ON_EPOCH_END.of(trainer.callback_handler)(trainer.args, trainer.state, trainer.control)
            trainer.control.should_save = True
            trainer.control.should_evaluate = False
            given = inspect.signature(plain_run).bind(*args, **kwargs).arguments
            what = (given["model"], given["trial"], given["epoch"], None, given["start_time"])
            LOG_SAVE_EVALUATE.of(trainer)(LOSS_SO_FAR.of(trainer), None, *what)

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_resumed and not self.has_begun:
            return {}  # ``eval_on_start`` belongs to the start of the run: it is in the log, and callbacks were told
        logged = len(self._trainer.state.log_history)
        mark = self._log_window.mark()
        self._random_states.remember()
        self.running = True
        try:
            with (
                seeded_before(self._workers_were_there),
                self._random_states.evaluation(),
                self._phases.within(Phase.EVALUATION),
            ):
                return EVALUATE.plain(self._trainer)(*args, **kwargs)
        except _Cut:
            self._random_states.return_to_remembered()
            self._log_window.rewind(mark)
            del self._trainer.state.log_history[logged:]  # several evaluation sets log one after another
            self._trainer.model.train()  # type: ignore[union-attr]
            self.was_cut = True
            self._when_cut()
            return {}
        finally:
            self.running = False

    def _evaluated(self, *args: Any, **kwargs: Any) -> Any:
        before, self.running = self.running, False
        try:
            return self._on_evaluate(*args, **kwargs)
        finally:
            self.running = before  # there may be several evaluation sets

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # With save_strategy="best" Trainer saves if this is true, and only then: a save that is due for another reason, such as
        # the one at the end of the training, must be made as well.
        is_due = bool(self._trainer.control.should_save)
        if self.was_cut:
            return is_due
        return bool(BEST_METRIC.plain(self._trainer)(metrics=metrics, trial=trial)) or is_due


def workers_are_unknown(trainer: Trainer, checkpoint: Path) -> bool:
    """Return whether evaluations had persistent workers of which a checkpoint, of an earlier hf_spot, tells nothing; say so."""
    args = trainer.args
    history = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).log_history
    has_evaluated = any(key.startswith("eval_") for line in history for key in line)
    were_there = bool(has_evaluated and args.dataloader_persistent_workers and args.dataloader_num_workers)
    if were_there:
        warn_for_all(
            "evaluations begin with new DataLoader workers, but an uninterrupted run keeps its workers: if their data or "
            "collator draw random numbers, metrics differ from those of an uninterrupted run, because an earlier hf_spot saved "
            "this checkpoint"
        )
    return were_there
