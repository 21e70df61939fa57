"""An optimizer step of several micro-batches, and how to undo one that was started.

Trainer saves the state after the last finished step. A step that is abandoned halfway must leave no trace in it: its
forward passes have drawn random numbers, changed buffers (the running statistics of BatchNorm) and counted tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer

from hf_spot.training.trainer.log_window import LogWindow, Mark
from hf_spot.training.trainer.random_states import RandomStates
from hf_spot.training.trainer.resume_fixes import carry_counters, counters
from hf_spot.training.upstream import ACCUMULATION, FLOS, FOREACH_COPY

_MOST_BUFFER_BYTES = 64_000_000  # copied once a step
_DEVICES = ("cpu", "cuda")  # those whose random state `RandomStates` can restore during a training


class Accumulation:
    """Times the micro-batches of a step, and can undo those that were done.

    Args:
        trainer: the Trainer.
        random_states: of this training.
        log_window: of this training.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        trainer: Trainer,
        random_states: RandomStates,
        log_window: LogWindow,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._trainer = trainer
        self._random_states = random_states
        self._log_window = log_window
        self._mark: Mark | None = None
        self._clock = clock
        self._buffers: list[torch.Tensor] | None = None
        self._before: list[torch.Tensor] = []
        self._counted: tuple[Any, Any, dict[str, int]] = (0.0, 0, {})
        self._began = 0.0
        self._done = 0

    def begin(self) -> None:
        """Record the state at the start of a step."""
        self._random_states.step_begins()
        self._mark = self._log_window.mark()
        if self._buffers is None:
            self._buffers = self._find_buffers()
            self._before = [torch.empty_like(buffer) for buffer in self._buffers] if self._can_rewind() else []
        if self._before:
            FOREACH_COPY.of(torch)(self._before, self._buffers)
        self._counted = (FLOS.of(self._trainer), self._trainer.state.num_input_tokens_seen, counters(self._trainer))
        self._began, self._done = self._clock(), 0

    def micro_batch_ended(self) -> float:
        """Record the end of a micro-batch that is not the last of its step; return the estimated seconds for the rest of it."""
        self._done += 1
        each_s = (self._clock() - self._began) / self._done
        return each_s * (int(ACCUMULATION.of(self._trainer)) - self._done)

    def rewindable(self) -> bool:
        """Return whether `rewind` can be called.

        False if buffers are very large or were replaced by a forward pass, or if the device's random state can't be restored.
        """
        now = self._find_buffers()
        return (
            self._buffers is not None
            and self._can_rewind()
            and len(now) == len(self._buffers)
            and all(one is other for one, other in zip(now, self._buffers, strict=True))
        )

    def rewind(self) -> None:
        """Restore the state at the start of the step, except gradients, which no checkpoint contains."""
        self._random_states.rewind()
        if self._mark is not None:
            self._log_window.rewind(self._mark)
        if self._before and self._buffers:
            FOREACH_COPY.of(torch)(self._buffers, self._before)
        flos, self._trainer.state.num_input_tokens_seen, counted = self._counted
        FLOS.set(self._trainer, flos)
        carry_counters(self._trainer, counted)

    def _find_buffers(self) -> list[torch.Tensor]:
        return list(self._trainer.model.buffers())  # type: ignore[union-attr]

    def _can_rewind(self) -> bool:
        size_bytes = sum(buffer.nbytes for buffer in self._buffers or [])
        return self._trainer.args.device.type in _DEVICES and size_bytes <= _MOST_BUFFER_BYTES
