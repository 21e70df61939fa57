"""The entry point: ``Trainer.train`` is wrapped once, so that a `SpotCallback` can restore before Trainer reads a checkpoint.

A callback never gets a reference to its trainer, and ``on_train_begin`` is too late to resume.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Generic, TypeVar

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler

from hf_spot.errors import ConfigError, TrainingPreempted
from hf_spot.log import warn_for_all
from hf_spot.runtime import Runtime
from hf_spot.training.trainer.trials import is_protected
from hf_spot.training.upstream import ON_TRAIN_BEGIN, TRAIN

C = TypeVar("C", bound=TrainerCallback)
_INSTALLED = {"site-packages", "dist-packages"}  # folders of libraries


class _Trainings(threading.local):
    """The trainers that are inside ``Trainer.train`` in this thread, in the order of their calls."""

    def __init__(self) -> None:
        self.under_way: list[Trainer] = []


_trainings = _Trainings()
_everywhere: list[int] = []  # the threads that train, once for each training
_LONGEST_WAIT_S = 60.0


class Entry(Generic[C]):
    """Wraps ``Trainer.train`` for one kind of callback.

    A trainer that starts training without ``Trainer.train``, as a subclass with its own loop may do, is refused: the callback
    could neither restore nor save it.

    Args:
        kind: class of the callback.
        run: trains a trainer with such a callback; called with the callback, the trainer, the original ``train`` and its
            arguments.
        make: creates a callback for trainers that have none.
    """

    def __init__(self, kind: type[C], run: Callable[..., Any], make: Callable[[], C]) -> None:
        self._kind = kind
        self._run = run
        self._make = make
        self._for_all = False
        self._wrapped: type[Trainer] | None = None

    def install(self, trainer_class: type[Trainer], *, for_all: bool = False) -> None:
        """Wrap ``trainer_class.train``. Further calls have no effect.

        Args:
            trainer_class: ``transformers.Trainer``.
            for_all: give a callback to every trainer that has none, as under `hf-spot launch`.
        """
        self._for_all = self._for_all or for_all
        if self._wrapped is trainer_class:
            return
        self._wrapped = trainer_class
        entry, plain_train, plain_begin = self, TRAIN.of(trainer_class), ON_TRAIN_BEGIN.of(CallbackHandler)

        @functools.wraps(plain_train)
        def train(self: Trainer, resume_from_checkpoint: Any = None, trial: Any = None, *args: Any, **kwargs: Any) -> Any:
            meant = None if _is_nobodys_wish(resume_from_checkpoint, sys._getframe(1)) else resume_from_checkpoint
            try:
                with _within(self):
                    return entry._train(self, plain_train, meant, trial, *args, **kwargs)
            except TrainingPreempted:
                _wait_in_a_thread()
                raise

        @functools.wraps(plain_begin)
        def on_train_begin(self: CallbackHandler, *args: Any, **kwargs: Any) -> Any:
            if not any(trainer.callback_handler is self for trainer in _trainings.under_way):
                entry._check(self)
            return plain_begin(self, *args, **kwargs)

        TRAIN.set(trainer_class, train)
        ON_TRAIN_BEGIN.set(CallbackHandler, on_train_begin)
        register_optimizer_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Check trainers whose loop calls no callbacks."""
        if not _trainings.under_way and (owner := _owner_of(None)) is not None:
            self._check(owner.callback_handler)

    def _train(
        self, trainer: Trainer, plain_train: Callable[..., Any], resumed: Any, trial: Any, *args: Any, **kwargs: Any
    ) -> Any:
        callbacks = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, self._kind)]
        if len(callbacks) > 1:
            raise ConfigError(f"this Trainer has two {self._kind.__name__}s", hint="keep one of them")
        nested = len(_trainings.under_way) > 1
        if callbacks or self._for_all:
            if trial is not None and not is_protected(trainer):
                warn_for_all("a hyperparameter search is preemptible only with backend='optuna'")
            elif nested:
                warn_for_all("a training inside another training is not preemptible: after an interruption it starts again")
        unprotected = nested or (trial is not None and not is_protected(trainer))
        if unprotected or not (callbacks or self._for_all):
            with _without(trainer, callbacks):
                return plain_train(trainer, resumed, trial, *args, **kwargs)
        if not callbacks:
            callbacks = [self._make()]
            trainer.add_callback(callbacks[0])
        return self._run(callbacks[0], trainer, plain_train, resumed, trial, *args, **kwargs)

    def _check(self, handler: CallbackHandler) -> None:
        """Raise ConfigError for a training that bypasses ``Trainer.train``, if it should be preemptible."""
        if not self._for_all and not any(isinstance(callback, self._kind) for callback in handler.callbacks):
            return
        owner = _owner_of(handler)
        name = "a subclass of Trainer" if owner is None else type(owner).__name__
        raise ConfigError(
            f"{name} trains without Trainer.train(): {self._kind.__name__} can neither save nor resume it",
            hint=f"call super().train(…) in {name}.train(), or use SpotCheckpointManager in its loop",
        )


@contextlib.contextmanager
def _within(trainer: Trainer) -> Iterator[None]:
    this = threading.get_ident()
    if any(one != this for one in _everywhere):
        warn_for_all(
            "two trainings at once in the threads of one process draw from the same random generators, and are never twice the "
            "same: train each in a process of its own"
        )
    _trainings.under_way.append(trainer)
    _everywhere.append(this)
    try:
        yield
    finally:
        _trainings.under_way.remove(trainer)
        _everywhere.remove(this)


def _wait_in_a_thread() -> None:
    """Let the launcher end this process, if the last of its trainings was stopped in a thread: Python ends that thread without
    a word, and what the script does next would take a half-trained model for the finished one."""
    runtime = Runtime.from_environ(os.environ)
    if threading.current_thread() is not threading.main_thread() and runtime is not None and not _everywhere:
        runtime.tell_left()
        time.sleep(_LONGEST_WAIT_S)


@contextlib.contextmanager
def _without(trainer: Trainer, callbacks: list[Any]) -> Iterator[None]:
    """Remove callbacks from a trainer within the block: they may belong to the training around it."""
    handler = trainer.callback_handler
    before = list(handler.callbacks)
    handler.callbacks[:] = [callback for callback in before if callback not in callbacks]
    try:
        yield
    finally:
        added = [callback for callback in handler.callbacks if callback not in before]
        handler.callbacks[:] = [
            callback for callback in before if callback in handler.callbacks or callback in callbacks
        ] + added


def _is_nobodys_wish(resumed: Any, caller: FrameType) -> bool:
    """Return whether ``train(resume_from_checkpoint=False)`` is called by a library whose own function has that as its default,
    such as ``fit`` of sentence-transformers. In a script it means to begin anew."""
    if resumed is not False or not _INSTALLED & set(Path(caller.f_code.co_filename).parts):
        return False
    name, owner = caller.f_code.co_name, caller.f_locals.get("self")
    function = caller.f_globals.get(name) if owner is None else getattr(owner, name, None)
    try:
        parameter = inspect.signature(function).parameters.get("resume_from_checkpoint")  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return parameter is not None and parameter.default is False


def _owner_of(handler: CallbackHandler | None) -> Trainer | None:
    """Return the trainer of a handler, or any trainer for None, from the call stack: a handler has no reference to it."""
    frame = sys._getframe()
    while frame is not None:
        if "self" in frame.f_code.co_varnames[:1]:  # reading all locals would take microseconds
            owner = frame.f_locals.get("self")
            if isinstance(owner, Trainer) and handler in (None, owner.callback_handler):
                return owner
        frame = frame.f_back  # type: ignore[assignment]  # None after the last one
    return None
