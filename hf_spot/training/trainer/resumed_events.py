"""Events around a resume: callbacks see and leave what they see and leave in an uninterrupted training.

Trainer sends ``on_train_begin`` in each launch, repeats ``on_epoch_begin`` for the rest of a pass, sends ``on_epoch_end`` when
a notice stops it in the middle of a pass, and omits it if the checkpoint of a pass's last step was saved before it.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerState

from hf_spot.log import warn_for_all
from hf_spot.policy.passes import Began, Place
from hf_spot.training.state.carried import CarriedState
from hf_spot.training.state.values import is_tensor, mark_of
from hf_spot.training.state.walk import is_of_script
from hf_spot.training.trainer.evaluation import Evaluations, Stopped
from hf_spot.training.upstream import (
    CALLBACK_HANDLER,
    CALLBACKS,
    LOAD_FROM_CHECKPOINT,
    LOAD_OPTIMIZER,
    ON_EPOCH_BEGIN,
    ON_EPOCH_END,
    ON_TRAIN_BEGIN,
)

_SHOWN = ("epoch", "global_step", "num_input_tokens_seen", "total_flos", "best_metric", "best_global_step")
_LOG_LINES = "log_lines"


def as_shown(state: TrainerState) -> dict[str, Any]:
    """Return what callbacks see in a state, as JSON: numbers, and how many lines have been logged."""
    values = {name: getattr(state, name) for name in _SHOWN}
    finite = {name: one for name, one in values.items() if not isinstance(one, float) or math.isfinite(one)}
    return {**finite, _LOG_LINES: len(state.log_history)}


@contextlib.contextmanager
def showing(state: TrainerState, shown: Mapping[str, Any]) -> Iterator[None]:
    """Let a state show earlier values within the block; what the block writes to them is discarded.

    Args:
        state: Trainer's state.
        shown: from `as_shown`.
    """
    earlier = {name: shown[name] for name in _SHOWN if name in shown}
    if _LOG_LINES in shown:
        earlier["log_history"] = copy.deepcopy(state.log_history[: shown[_LOG_LINES]])
    if "best_global_step" in shown and shown["best_global_step"] != state.best_global_step:
        step, now = shown["best_global_step"], state.best_model_checkpoint
        folder = None if now is None else os.path.join(os.path.dirname(now), f"checkpoint-{step}")
        earlier["best_model_checkpoint"] = folder if step else None
    before = {name: getattr(state, name) for name in earlier}
    vars(state).update(earlier)
    try:
        yield
    finally:
        vars(state).update(before)


@contextlib.contextmanager
def only(trainer: Trainer, keep: Callable[[Any], bool]) -> Iterator[None]:
    """Remove callbacks within the block.

    Args:
        trainer: the Trainer.
        keep: returns whether a callback stays. Trainer's own for its flow and the terminal always do.
    """
    callbacks = CALLBACKS.of(CALLBACK_HANDLER.of(trainer))
    before = list(callbacks)
    callbacks[:] = [one for one in before if type(one).__module__ == TrainerCallback.__module__ or keep(one)]
    try:
        yield
    finally:
        callbacks[:] = before


def is_of_the_script(callback: Any) -> bool:
    """Return whether a callback's class is the user's, and not a tracker or another one of a library."""
    return is_of_script(type(callback))


class ResumedEvents:
    """Sends the events of `Trainer`'s callbacks from `watch` to `close`.

    Args:
        trainer: the Trainer.
        own: hf_spot's callback, which gets every event.
        carried: state that callbacks keep, and Trainer does not save.
        evaluations: of this training.
        is_stopping: returns whether a notice ends the training.
        place: where the training resumes; None for a new one.
        checkpoint: folder that it resumes from, or None.
    """

    def __init__(
        self,
        trainer: Trainer,
        own: TrainerCallback,
        carried: CarriedState,
        evaluations: Evaluations,
        is_stopping: Callable[[], bool],
        place: Place | None,
        checkpoint: Path | None,
    ) -> None:
        self._trainer = trainer
        self._handler: Any = CALLBACK_HANDLER.of(trainer)
        self._own = own
        self._carried = carried
        self._evaluations = evaluations
        self._is_stopping = is_stopping
        self._place = self._ahead = place
        self._checkpoint = checkpoint
        self._restore: Callable[[bool], None] = lambda last: None
        self._return: Callable[[], None] = lambda: None
        self._begun: Callable[[], None] = lambda: None
        self._number = -1 if place is None else place.number - 1
        self._began = Began()
        self._end_was_told = place is not None and not (place.is_repeated or place.owes_end)  # of the pass before the resume

    def watch(
        self, restore: Callable[[bool], None], return_to_checkpoint: Callable[[], None], begun: Callable[[], None]
    ) -> None:
        """Start sending.

        Args:
            restore: restores and verifies the state of the script. Called after ``on_train_begin``, when callbacks have created
                what must be restored, with False if a repeated event comes, after which it is called again, with True.
            return_to_checkpoint: restores random states, and makes up for what an uninterrupted run does before the next pass.
            begun: called after ``on_train_begin``, too.
        """
        self._restore, self._return, self._begun = restore, return_to_checkpoint, begun
        ON_TRAIN_BEGIN.set(self._handler, self._train_begins)
        ON_EPOCH_BEGIN.set(self._handler, self._epoch_begins)
        ON_EPOCH_END.set(self._handler, self._epoch_ends)

    def close(self) -> None:
        """Restore the handler's methods."""
        for name in (ON_TRAIN_BEGIN, ON_EPOCH_BEGIN, ON_EPOCH_END):
            name.restore(self._handler)

    @property
    def number(self) -> int:
        """Return the number of the pass under way, from 0; -1 before the first."""
        return self._number

    @property
    def began(self) -> Began:
        """Return what a commit records about the pass under way."""
        return self._began

    # -- in place of the handler's methods ----------------------------------------------------------------------------

    def _train_begins(self, *args: Any, **kwargs: Any) -> Any:
        with self._carried.writes_noted(), weights_kept(self._trainer, self._checkpoint):
            control = ON_TRAIN_BEGIN.plain(self._handler)(*args, **kwargs)
        self._restore(self._place is None or not self._place.is_repeated)
        self._begun()
        return control

    def _epoch_begins(self, args: Any, state: TrainerState, control: Any) -> Any:
        place, self._ahead = self._ahead, None
        self._number += 1
        begin = ON_EPOCH_BEGIN.plain(self._handler)
        if place is not None and place.is_repeated:
            with showing(state, place.shown):
                self._began = Began(as_shown(state))
                with weights_kept(self._trainer, self._checkpoint):
                    control = begin(args, state, control)
            self._restore(True)
            return control
        if place is not None and not self._trainer.args.ignore_data_skip:
            try:
                self._return()
            except Stopped:
                self._evaluations.stop_before_epoch()
                with only(self._trainer, lambda one: one is self._own):
                    return begin(args, state, self._trainer.control)
            control = self._trainer.control
        self._began, self._end_was_told = Began(as_shown(state)), False
        with self._carried.writes_noted():
            return begin(args, state, control)

    def _epoch_ends(self, args: Any, state: TrainerState, control: Any) -> Any:
        end = ON_EPOCH_END.plain(self._handler)
        # After a stop the next launch trains the rest of the pass, or tells callbacks that it has ended.
        if self._is_stopping() or self._end_was_told:
            with only(self._trainer, lambda one: one is self._own):
                return end(args, state, control)
        self._began = Began(self._began.shown, end_was_told=True, is_over=not control.should_training_stop)
        return end(args, state, control)

    def make_up_for_end(self) -> None:
        """Tell callbacks that the pass before the resumed one has ended, if the launch that trained it did not.

        Raises:
            Stopped: one of them ends the training.
        """
        if self._place is None or not self._place.owes_end:
            return
        trainer, flags = self._trainer, copy.copy(self._trainer.control)
        self._end_was_told = True
        with only(trainer, lambda one: one is not self._own):
            trainer.control = ON_EPOCH_END.plain(self._handler)(trainer.args, trainer.state, trainer.control)
        # Trainer's own callback asks for what is made up for separately.
        for name in ("should_save", "should_evaluate", "should_log"):
            setattr(trainer.control, name, getattr(flags, name))
        if trainer.control.should_training_stop:
            raise Stopped


@contextlib.contextmanager
def weights_kept(trainer: Trainer, checkpoint: Path | None) -> Iterator[None]:
    """Load model, optimizer and schedule of a checkpoint again if the block has changed them: callbacks do so at a start.

    Args:
        trainer: the Trainer, which has loaded the checkpoint.
        checkpoint: its folder; None for a new training, which keeps what its callbacks do.
    """
    if checkpoint is None:
        yield
        return
    model, optimizer = _versions_of_model(trainer), _versions_of_optimizer(trainer)
    yield
    for load, name, before, now in (
        (LOAD_FROM_CHECKPOINT, "model", model, _versions_of_model(trainer)),
        (LOAD_OPTIMIZER, "optimizer", optimizer, _versions_of_optimizer(trainer)),
    ):
        if before == now:
            continue
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            warn_for_all(
                "a callback changes the %s in on_train_begin or on_epoch_begin, which is repeated at a resume: the weights "
                "differ from those of an uninterrupted run",
                name,
            )
        else:
            load.of(trainer)(str(checkpoint))


def _versions_of_model(trainer: Trainer) -> Any:
    model: Any = trainer.model
    return [(id(one), one.data_ptr(), one._version) for one in (*model.parameters(), *model.buffers()) if is_tensor(one)]


def _versions_of_optimizer(trainer: Trainer) -> Any:
    groups = getattr(trainer.optimizer, "param_groups", ())
    settings = [mark_of({name: value for name, value in group.items() if name != "params"}) for group in groups]
    schedule = None if trainer.lr_scheduler is None else mark_of(trainer.lr_scheduler.state_dict())
    states = getattr(trainer.optimizer, "state", {})
    moments = [
        (id(one), name, id(value), value._version if isinstance(value, torch.Tensor) else 0)
        for one, held in states.items()
        for name, value in held.items()
    ]
    return settings, schedule, moments
