"""An end of the training that the script asks for, told apart from one that a notice brings: Trainer has one flag for both."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from transformers import Trainer, TrainerControl

from hf_spot.training.upstream import CALL_EVENT, CALLBACK_HANDLER


class WantedEnd:
    """Observes ``control.should_training_stop`` in every event: its callbacks see what they see without a notice.

    Args:
        trainer: the Trainer.
        told: called with the name of each event after its callbacks.
    """

    def __init__(self, trainer: Trainer, told: Callable[[str, TrainerControl], None]) -> None:
        self._handler: Any = CALLBACK_HANDLER.of(trainer)
        self._told = told
        self._is_ours = False
        self._depth = 0
        self.is_wanted = False

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Observe the events within the block."""
        with CALL_EVENT.replaced(self._handler, self._in_place_of):
            yield

    def stop(self, control: TrainerControl) -> None:
        """Let the training end for a notice: at once, or after the event under way."""
        self._is_ours = True
        if not self._depth:
            control.should_training_stop = True

    def _in_place_of(self, call_event: Callable[..., TrainerControl]) -> Callable[..., TrainerControl]:
        def call(event: str, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> TrainerControl:
            if self._is_ours and not self._depth:
                control.should_training_stop = self.is_wanted
            self._depth += 1
            try:
                control = call_event(event, args, state, control, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.is_wanted = control.should_training_stop
                    control.should_training_stop = self.is_wanted or self._is_ours
            self._told(event, control)
            return control

        return call
