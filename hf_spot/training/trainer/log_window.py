"""What Trainer reports, once per run and not once per launch.

Trainer adds up losses on the device and reports their mean at each log line: its *window*, the steps since the last line. No
checkpoint holds it, nor the sum for ``train_loss``, nor when the training began. `LogWindow` adds them to each checkpoint and
restores them, so that ``state.log_history``, the lines that trackers get, and the metrics that ``train()`` returns are those
of an uninterrupted run. Verified with transformers 5.8 to 5.24.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import numpy
import torch
from transformers import Trainer
from transformers.trainer_utils import IntervalStrategy, TrainOutput, speed_metrics

from hf_spot.training.upstream import (
    FINALIZE,
    FIRST_STEP,
    FIRST_TOKENS,
    FLOS,
    INITIAL_VALUES,
    LAST_LOGGED,
    LOG_LINE,
    LOG_SAVE_EVALUATE,
    LOSS_SO_FAR,
    STORE_FLOS,
    TOTAL_LOSS,
)

log = logging.getLogger("hf_spot")

_FOLDER = "log_window"  # inside a checkpoint; each rank adds up its own losses
# Trainers of other libraries average more than the loss (TRL's rewards and entropies, sentence-transformers' parts of a
# loss); they report and reset these values in overrides of these methods.
_REPORTING = (LOG_LINE.name, LOG_SAVE_EVALUATE.name)
_OWN = {one.name for one in (LOSS_SO_FAR, TOTAL_LOSS, LAST_LOGGED, FLOS)}


@dataclass(frozen=True)
class Mark:
    """A moment to which `LogWindow.rewind` can return."""

    tr_loss: torch.Tensor
    also: dict[str, Any]


class LogWindow:
    """Wraps a trainer's logging from `watch` to `close`.

    Args:
        trainer: the Trainer.
        is_stopping: returns whether a notice ends the training; a later launch then reports the end.
        is_extra: returns whether the save under way is one that an uninterrupted run would not make.
        end_is_wanted: returns whether the script ends the training, whether a notice does so, too, or not.
        step_ended: called with the number of each step that was done, and its learning rate, before anything is logged or
            saved; possibly more than once.
        all_done: called with Trainer's model and trial after each step, when Trainer has logged, evaluated and saved.
    """

    def __init__(
        self,
        trainer: Trainer,
        is_stopping: Callable[[], bool] = lambda: False,
        is_extra: Callable[[], bool] = lambda: False,
        end_is_wanted: Callable[[], bool] = lambda: False,
        step_ended: Callable[[int, float | None], None] = lambda step, learning_rate: None,
        all_done: Callable[[Any, Any], None] = lambda model, trial: None,
    ) -> None:
        self._trainer = trainer
        self._step_ended = step_ended
        self._all_done = all_done
        self._is_stopping = is_stopping
        self._is_extra = is_extra
        self._end_is_wanted = end_is_wanted
        self._began_s = time.time()
        self._earlier_s = 0.0
        self._samples: float | None = None
        self._flos: tuple[float, float] | None = None
        self._last: tuple[int, Any, Any] = (-1, None, None)  # step, norm of its gradient, learning rate
        self._first: dict[str, Any] = {}
        self._carried: set[str] = set()
        self._pending = False
        self._names = _names(type(trainer))

    # -- in a training ------------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Start wrapping. Call it before the training begins."""
        for name, method in (
            (LOG_SAVE_EVALUATE, self._log_save_evaluate),
            (FINALIZE, self._finalize),
            (STORE_FLOS, self._store_flos),
            (INITIAL_VALUES, self._initial_values),
        ):
            name.set(self._trainer, method)

    def begin(self, checkpoint: Path | None) -> None:
        """Restore the window of a checkpoint. Call it after Trainer has reset its own.

        Args:
            checkpoint: the checkpoint that the training resumes from, or None.
        """
        self._began_s = time.time()
        self._first = _copies_of(self._trainer, self._names)
        if checkpoint is not None:
            self._load(checkpoint)

    def save(self, checkpoint: Path) -> None:
        """Add this rank's window to a checkpoint; Trainer has written the rest of it."""
        trainer = self._trainer
        also = _copies_of(trainer, self._names)
        carried = {name for name, value in also.items() if name in self._carried or not _equal(value, self._first.get(name))}
        if self._is_extra() and self._flos is not None:
            # Undo Trainer's addition for this save: a sum of floats depends on its order.
            self._set_flos(*self._flos)
        step, norm, rate = self._last
        window = {
            "tr_loss": LOSS_SO_FAR.of(trainer).detach().cpu(),
            "total_loss": float(TOTAL_LOSS.of(trainer)),
            "last_logged": LAST_LOGGED.of(trainer),
            "last": (step, norm.item() if isinstance(norm, torch.Tensor) else norm, rate),
            "log_pending": self._log_is_pending(),
            "seconds": self._earlier_s + time.time() - self._began_s,
            "samples": self._samples,
            "flos": (float(trainer.state.total_flos), float(FLOS.of(trainer))),
            "first_step": FIRST_STEP.of(trainer) if FIRST_STEP.is_on(trainer) else 0,  # older ones count from step 0
            "first_tokens": FIRST_TOKENS.of(trainer),
            "also": {name: also[name] for name in carried},
        }
        (checkpoint / _FOLDER).mkdir(exist_ok=True)
        torch.save(window, str(checkpoint / _FOLDER / f"rank_{trainer.args.process_index}.pt"))

    def make_up(self) -> None:
        """Write the log line at the end of an epoch that the previous launch did not reach, if there is one."""
        if not self._pending:
            return
        trainer, (_, norm, rate) = self._trainer, self._last
        trainer.control.should_log = True
        trainer.control.should_evaluate = trainer.control.should_save = False
        began_s = self._began_s - self._earlier_s
        what = (trainer.model, None, trainer.state.epoch or 0, None, began_s)
        LOG_SAVE_EVALUATE.plain(trainer)(LOSS_SO_FAR.of(trainer), norm, *what, learning_rate=rate)

    def mark(self) -> Mark:
        """Return a mark for `rewind`, before a step or an evaluation that may be abandoned."""
        trainer = self._trainer
        return Mark(LOSS_SO_FAR.of(trainer).clone(), _copies_of(trainer, self._names, by_length=True))

    def rewind(self, mark: Mark) -> None:
        """Discard what was added up since ``mark``."""
        LOSS_SO_FAR.of(self._trainer).copy_(mark.tr_loss)
        _restore(self._trainer, mark.also)

    def close(self) -> None:
        """Restore the trainer's methods."""
        for name in (LOG_SAVE_EVALUATE, FINALIZE, STORE_FLOS, INITIAL_VALUES):
            name.restore(self._trainer)

    # -- in place of Trainer's methods --------------------------------------------------------------------------------

    def _log_save_evaluate(
        self,
        tr_loss: Any,
        grad_norm: Any,
        model: Any,
        trial: Any,
        epoch: Any,
        ignore_keys_for_eval: Any,
        start_time: float,
        learning_rate: Any = None,
    ) -> None:
        step, norm, rate = self._last
        if learning_rate is None and step == self._trainer.state.global_step:
            grad_norm, learning_rate = norm, rate  # no step since the resume: this is the end of an epoch
        self._last = (self._trainer.state.global_step, grad_norm, learning_rate)
        self._step_ended(self._trainer.state.global_step, learning_rate)
        self._flos = None
        what = (tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time - self._earlier_s)
        LOG_SAVE_EVALUATE.plain(self._trainer)(*what, learning_rate=learning_rate)
        self._all_done(model, trial)

    def _finalize(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        end = FINALIZE.plain(self._trainer)
        stopping = self._is_stopping()
        with LOG_LINE.replaced(self._trainer, lambda plain: _log_nothing) if stopping else contextlib.nullcontext():
            return end(trial, num_train_samples, start_time - self._earlier_s)

    def _store_flos(self) -> None:
        self._flos = (self._trainer.state.total_flos, FLOS.of(self._trainer))
        STORE_FLOS.plain(self._trainer)()

    def _initial_values(self, *args: Any, **kwargs: Any) -> Any:
        values = INITIAL_VALUES.plain(self._trainer)(*args, **kwargs)
        self._samples = values[3]
        return values

    # -- the parts of a window ----------------------------------------------------------------------------------------

    def _log_is_pending(self) -> bool:
        """Return whether an uninterrupted run logs between this save and the next step, at the end of an epoch."""
        trainer = self._trainer
        args, state = trainer.args, trainer.state
        is_ended = trainer.control.should_training_stop and not self._is_stopping()
        ends = state.global_step >= state.max_steps or is_ended or self._end_is_wanted()
        at_end = ends or (state.epoch is not None and float(state.epoch).is_integer())
        by_epoch = args.logging_strategy == IntervalStrategy.EPOCH
        return by_epoch and at_end and state.global_step > LAST_LOGGED.of(trainer)

    def _load(self, checkpoint: Path) -> bool:
        """Restore the window of a checkpoint; return False if it contains none."""
        trainer, files = self._trainer, sorted((checkpoint / _FOLDER).glob("rank_*.pt"))
        if not files:
            if trainer.args.process_index == 0:
                log.warning(
                    "%s does not contain the losses for the next log line: that line, and train_loss, will cover only the "
                    "steps from here on",
                    checkpoint.name,
                )
            return False
        windows = [torch.load(file, map_location="cpu", weights_only=True) for file in files]
        rank, ranks = trainer.args.process_index, trainer.args.world_size
        window, tr_loss, (total_flos, current_flos) = windows[0], windows[0]["tr_loss"], windows[0]["flos"]
        if len(windows) == ranks:
            window = torch.load(checkpoint / _FOLDER / f"rank_{rank}.pt", map_location="cpu", weights_only=True)
            tr_loss, current_flos = window["tr_loss"], window["flos"][1]
        else:  # a log line reports the mean loss of the ranks, and the sum of their operations
            losses = torch.stack([one["tr_loss"] for one in windows])
            tr_loss = losses[0] if bool((losses == losses[0]).all()) else losses.mean(0)  # a mean of equal ones may differ
            current_flos = sum(one["flos"][1] for one in windows) if rank == 0 else 0.0  # ranks exchange it: of one type
        LOSS_SO_FAR.set(trainer, tr_loss.to(trainer.args.device))
        TOTAL_LOSS.set(trainer, window["total_loss"])
        LAST_LOGGED.set(trainer, window["last_logged"])
        self._set_flos(total_flos, current_flos)
        FIRST_STEP.set(trainer, window["first_step"])
        FIRST_TOKENS.set(trainer, window["first_tokens"])
        self._earlier_s, self._samples, self._last = window["seconds"], window["samples"], window["last"]
        self._pending, self._carried = window["log_pending"], set(window["also"])
        _restore(trainer, window["also"])
        return True

    def _set_flos(self, total: float, current: float) -> None:
        self._trainer.state.total_flos = total
        FLOS.set(self._trainer, current)

    # -- of a finished training ---------------------------------------------------------------------------------------

    def load_finished(self, checkpoint: Path) -> bool:
        """Restore the window of a training's last checkpoint, outside ``train()``; return False if it contains none."""
        return self._load(checkpoint)

    def summarize(self) -> TrainOutput:
        """Report the end of a finished training as Trainer does. Call it after `load_finished`."""
        trainer = self._trainer
        STORE_FLOS.of(trainer)()
        steps = trainer.state.global_step - FIRST_STEP.of(trainer)
        train_loss = (TOTAL_LOSS.of(trainer) + LOSS_SO_FAR.of(trainer).item()) / max(steps, 0.001)
        began_s = time.time() - self._earlier_s
        measure: Any = speed_metrics
        metrics: dict[str, float] = measure("train", began_s, num_samples=self._samples, num_steps=steps)
        metrics |= {"total_flos": trainer.state.total_flos, "train_loss": train_loss}
        trainer.log(metrics)
        return TrainOutput(trainer.state.global_step, train_loss, metrics)


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Take the place of `Trainer.log`."""


@dataclass(frozen=True)
class _Length:
    """The length of a list that only grows until it is reported: enough to restore it without a copy."""

    count: int


class _NotPlain(Exception):
    """A value is not a number, a string, a tensor or a collection of these."""


def _copies_of(trainer: Trainer, names: frozenset[str], *, by_length: bool = False) -> dict[str, Any]:
    """Return copies of the plain values that a subclass of Trainer reports.

    Args:
        trainer: the Trainer.
        names: names of the attributes.
        by_length: keep only the length of a list.
    """
    found = {}
    for name in names & vars(trainer).keys():
        with contextlib.suppress(_NotPlain):
            found[name] = _copy(vars(trainer)[name], by_length)
    return found


def _names(kind: type[Trainer]) -> frozenset[str]:
    """Return the names that a class's own reporting methods read or write."""
    methods = [
        vars(one)[name] for one in kind.__mro__[: kind.__mro__.index(Trainer)] for name in _REPORTING if name in vars(one)
    ]
    return frozenset(name for method in methods for name in _names_in(inspect.unwrap(method).__code__)) - _OWN


def _names_in(code: CodeType) -> set[str]:
    inner = [_names_in(one) for one in code.co_consts if isinstance(one, CodeType)]
    return set(code.co_names).union(*inner)


def _copy(value: Any, by_length: bool) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numpy.generic):
        return value.item()
    if isinstance(value, int | float):
        return value
    if isinstance(value, torch.Tensor):
        return value.detach().clone() if by_length else value.detach().cpu().clone()
    if isinstance(value, list) and by_length:
        return _Length(len(value))
    if isinstance(value, list | deque):
        return [_copy(one, by_length) for one in value]
    if isinstance(value, tuple):
        return tuple(_copy(one, by_length) for one in value)
    if isinstance(value, dict):
        return {_copy(key, by_length): _copy(one, by_length) for key, one in value.items()}
    raise _NotPlain


def _equal(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    return bool(one == other)


def _restore(trainer: Trainer, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(trainer, name, _refill(getattr(trainer, name, None), value, trainer.args.device))


def _refill(target: Any, value: Any, device: torch.device) -> Any:
    """Return ``target`` with the contents that `_copy` took, or the value itself if ``target`` is not a collection.

    Collections stay the same objects, because a ``defaultdict`` has a factory and a ``deque`` a maximum length.
    """
    if isinstance(value, _Length):
        del target[value.count :]
        return target
    if isinstance(value, torch.Tensor):
        return value.to(target.device if isinstance(target, torch.Tensor) else device)
    if isinstance(value, dict) and isinstance(target, dict):
        for key in target.keys() - value.keys():
            del target[key]
        for key, one in value.items():
            known = key in target or isinstance(target, defaultdict)
            target[key] = _refill(target[key] if known else None, one, device)
        return target
    if isinstance(value, list) and isinstance(target, list | deque):
        target.clear()
        target.extend(value)
        return target
    return value
