"""Holds exceptions of other callbacks until a save is handed over: a failing tracker must not cost the checkpoint. The same
holds for what Trainer does after a save: a push to the Hub, the rotation of older checkpoints.

Then the exception is raised, as Trainer itself would have done, or logged if the training ends anyway.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl

from hf_spot.training.saving.async_writer import AsyncCheckpointWriter
from hf_spot.training.upstream import CALL_EVENT, CALLBACK_HANDLER, CALLBACKS

log = logging.getLogger("hf_spot")

_BEFORE_A_SAVE = ("on_step_end", "on_log", "on_evaluate")
_BEHIND_A_SAVE = ("on_step_begin", "on_epoch_begin", "on_train_end")


class _Tolerant:
    """Wraps a callback whose exceptions are recorded instead of raised."""

    def __init__(
        self,
        callback: TrainerCallback,
        note: Callable[[Exception], None],
        around: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self.callback = callback
        self._note = note
        self._around = around

    def __getattr__(self, event: str) -> Any:
        act = getattr(self.callback, event)

        def tolerant(*args: Any, **kwargs: Any) -> Any:
            try:
                with self._around():
                    return act(*args, **kwargs)
            except Exception as error:
                self._note(error)
                return None

        return tolerant


class HeldErrors:
    """Holds exceptions that callbacks raise on the way to a save.

    Args:
        trainer: the Trainer.
        own: hf_spot's callback, whose exceptions are not held.
        stopping: returns whether the training ends after the save.
        behind: writes the files of saves: callbacks that touch them in ``on_save`` wait for it.
        comes: called with the name of each event, before the callbacks.
    """

    def __init__(
        self,
        trainer: Trainer,
        own: TrainerCallback,
        stopping: Callable[[], bool],
        behind: AsyncCheckpointWriter,
        comes: Callable[[str], None],
    ) -> None:
        self._handler: Any = CALLBACK_HANDLER.of(trainer)
        self._own = own
        self._stopping = stopping
        self._behind = behind
        self._comes = comes
        self._held: Exception | None = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold exceptions within the block."""
        with CALL_EVENT.replaced(self._handler, self._in_place_of):
            yield

    def _in_place_of(self, call_event: Callable[..., TrainerControl]) -> Callable[..., TrainerControl]:
        def call(event: str, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> TrainerControl:
            self._comes(event)
            due = control.should_save or event == "on_step_end"
            if event != "on_save" and not (event in _BEFORE_A_SAVE and due):
                if event in _BEHIND_A_SAVE:  # there was no save
                    self._release()
                return call_event(event, args, state, control, **kwargs)
            # On a copy of the handler: callbacks may look for others in the real one, or add and remove some.
            tolerant = copy.copy(self._handler)
            present = CALLBACKS.of(self._handler)
            around = self._behind.telling if event == "on_save" else contextlib.nullcontext
            note = self._note_of_save if event == "on_save" else self._note
            CALLBACKS.set(tolerant, [one if one is self._own else _Tolerant(one, note, around) for one in present])
            control = CALL_EVENT.plain(tolerant)(event, args, state, control, **kwargs)
            if event == "on_save" or not control.should_save:
                self._release()
            return control

        return call

    def hold(self, what: str, error: Exception) -> None:
        """Log an exception, and raise it when the next save is handed over, or before the next step.

        Args:
            what: has raised it.
            error: the exception.
        """
        if self._held is None:
            log.error("%s raised %s: %s; the checkpoint is saved first", what, type(error).__name__, error)
        self._held = self._held or error

    def _note(self, error: Exception) -> None:
        self.hold("a callback", error)

    def _note_of_save(self, error: Exception) -> None:
        if self._behind.failed:
            log.warning("a callback raised %s: %s; the checkpoint could not be written", type(error).__name__, error)
        else:
            self._note(error)

    def _release(self) -> None:
        error, self._held = self._held, None
        if error is None:
            return
        if self._stopping():
            log.warning("the training stops for another reason; the next launch may raise this again: %s", type(error).__name__)
            return
        raise error
