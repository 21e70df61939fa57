"""Evaluations that a notice can end: nobody evaluates through the last two minutes of a machine."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState

from hf_spot.training.data.worker_processes import seeded_before
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
    """Ends an evaluation from inside."""


class Stopped(Exception):
    """Ends a resumed training before its first step: the evaluation that was made up for says so."""


class Evaluations:
    """Takes over a trainer's evaluations until `close`.

    One that is cut leaves the training as it was before: random state, log, mode of the model. The launch after it makes up
    for it, from that same state.

    Args:
        trainer: whose evaluations are meant.
        random_states: of this training.
        log_window: of this training.
        when_cut: called after a cut; it decides whether to save.
        resumed: the checkpoint of this run that the training resumes, or None.
    """

    def __init__(
        self,
        trainer: Trainer,
        random_states: RandomStates,
        log_window: LogWindow,
        when_cut: Callable[[], None],
        resumed: Path | None,
    ) -> None:
        self._trainer = trainer
        self._random_states = random_states
        self._log_window = log_window
        self._when_cut = when_cut
        self._evaluated_before = resumed is not None and _has_evaluated(resumed)
        self._is_resumed = resumed is not None
        self.has_begun = False  # an epoch: before that, Trainer evaluates for ``eval_on_start`` only
        self.was_cut = False
        self.running = False  # on every rank at once, so that they can agree: not so in what callbacks evaluate themselves
        self._on_evaluate = ON_EVALUATE.of(trainer.callback_handler)
        ON_EVALUATE.set(trainer.callback_handler, self._evaluated)
        EVALUATE.set(trainer, self._evaluate)
        BEST_METRIC.set(trainer, self._determine_best_metric)
        RUN_EPOCH.set(trainer, self._run_epoch)

    def cut(self) -> None:
        """Called from an event of the evaluation: does not return."""
        raise _Cut

    def make_up(self) -> None:
        """The evaluation that a notice suppressed or cut in the launch before."""
        metrics = EVALUATE.of(self._trainer)(None, None)
        BEST_METRIC.of(self._trainer)(metrics=metrics, trial=None)
        self._trainer.model.train()  # type: ignore[union-attr]
        if self._trainer.control.should_training_stop and not self.was_cut:
            raise Stopped  # EarlyStoppingCallback, say; Trainer would look only after one step more

    def close(self) -> None:
        """Gives the trainer its methods back."""
        for name in (EVALUATE, BEST_METRIC, RUN_EPOCH):
            name.restore(self._trainer)
        ON_EVALUATE.restore(self._trainer.callback_handler)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self.has_begun = True
        plain_run = RUN_EPOCH.plain(self._trainer)
        try:
            plain_run(*args, **kwargs)
        except Stopped:
            # What Trainer does after the loop that it would have left; the checkpoint has to say that it is the last one.
            trainer = self._trainer
            trainer.control = ON_EPOCH_END.of(trainer.callback_handler)(trainer.args, trainer.state, trainer.control)
            trainer.control.should_save = True
            trainer.control.should_evaluate = False
            given = inspect.signature(plain_run).bind(*args, **kwargs).arguments
            what = (given["model"], given["trial"], given["epoch"], None, given["start_time"])
            LOG_SAVE_EVALUATE.of(trainer)(LOSS_SO_FAR.of(trainer), None, *what)

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_resumed and not self.has_begun:
            return {}  # ``eval_on_start`` is for the start of the run: its line is in the log, its callbacks have heard of it
        logged = len(self._trainer.state.log_history)
        mark = self._log_window.mark()
        self._random_states.remember()
        self.running = True
        try:
            with seeded_before(self._evaluated_before):
                return EVALUATE.plain(self._trainer)(*args, **kwargs)
        except _Cut:
            self._random_states.return_to_remembered()
            self._log_window.rewind(mark)
            del self._trainer.state.log_history[logged:]  # several evaluation sets log one by one
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
        if self.was_cut:
            # With save_strategy="best" Trainer saves if this is true.
            return bool(self._trainer.control.should_save)
        return bool(BEST_METRIC.plain(self._trainer)(metrics=metrics, trial=trial))


def _has_evaluated(checkpoint: Path) -> bool:
    history = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).log_history
    return any(key.startswith("eval_") for line in history for key in line)
