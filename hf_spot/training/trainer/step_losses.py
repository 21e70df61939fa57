"""The loss of each step, without waiting for the device.

Trainer adds losses up on the device, and reads the sum when it logs. Here the loss of each step is copied to pinned memory on
the stream that computes it, and is read when an event shows that the copy has arrived, usually one or two steps later.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from transformers import Trainer

from hf_spot.training.saving.device import in_order
from hf_spot.training.session.step_teller import StepTeller
from hf_spot.training.upstream import TRAINING_STEP

_SLOTS = 256  # losses on their way; a host is never so many steps ahead of its device
_Pending = tuple[int, Any, Any, Any]  # step, loss (a number, a tensor, or None), learning rate, indices


class StepLosses:
    """Collects what a step was, and tells it once its loss is known, from `watch` to `close`.

    Args:
        trainer: the Trainer.
        teller: gets the steps.
    """

    def __init__(self, trainer: Trainer, teller: StepTeller) -> None:
        self._trainer = trainer
        self._teller = teller
        self._loss: torch.Tensor | None = None
        self._pending: deque[_Pending] = deque()
        self._indices: Any = None
        self.first_not_finite: int | None = None  # a step
        self._told = 0
        self._slots: list[torch.Tensor] = []
        self._used = 0
        self._copied: torch.Event | None = None  # announces the copies of so many pending steps
        self._covered = 0
        self._copied_since = False
        self._plain = TRAINING_STEP.of(trainer)  # perhaps the script's own
        self._accumulates = trainer.args.gradient_accumulation_steps > 1

    def watch(self) -> None:
        """Start wrapping. Call it before the training begins."""
        TRAINING_STEP.set(self._trainer, self._training_step)

    def close(self) -> None:
        """Restore the trainer's method."""
        TRAINING_STEP.restore(self._trainer)

    def _training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = self._plain(*args, **kwargs)
        if isinstance(loss, torch.Tensor):
            if self._loss is not None:
                self._loss = self._loss + loss.detach()
            else:  # a compiled model may write the next micro-batch's loss to the same memory
                self._loss = loss.detach().clone() if self._accumulates else loss.detach()
        return loss

    def step_begins(self) -> None:
        """Forget the losses of a step that was abandoned."""
        self._loss = None

    def step_ended(self, indices: Any) -> None:
        """Record the indices of the step's samples; `learned` follows."""
        self._indices = indices

    def learned(self, step: int, learning_rate: float | None) -> None:
        """Record the end of a step, and tell the steps whose losses are known by now. Repeated calls do nothing.

        Args:
            step: its number.
            learning_rate: with which it was done; None if unknown.
        """
        if step <= self._told:
            return
        loss, self._loss, self._told = self._loss, None, step
        if loss is None or loss.numel() != 1:
            found: Any = None
        elif loss.device.type == "cpu":
            found = loss.item()
        else:
            found = self._copy(loss) if in_order(loss.device) else loss.clone()
        self._pending.append((step, found, learning_rate, self._indices))
        self._indices = None
        self._tell_known()

    def _copy(self, loss: torch.Tensor) -> torch.Tensor | None:
        """Start a copy to pinned memory; return the place where it will be, or None if too many are on their way."""
        if not self._slots or self._slots[0].dtype != loss.dtype:
            if self._pending:
                return None
            self._slots = list(torch.empty(_SLOTS, dtype=loss.dtype, pin_memory=True).unbind())
        if len(self._pending) >= _SLOTS:
            return None
        slot = self._slots[self._used % _SLOTS]
        self._used += 1
        slot.copy_(loss.reshape(()), non_blocking=True)
        self._copied_since = True
        return slot

    def _tell_known(self) -> None:
        if self._copied is not None and self._copied.query():
            for _ in range(self._covered):
                self._tell(*self._pending.popleft())
            self._copied, self._covered = None, 0
        if self._copied is None and self._copied_since:  # one event at a time: each takes microseconds
            self._copied = torch.accelerator.current_stream().record_event()
            self._covered, self._copied_since = len(self._pending), False
        while self._copied is None and self._pending and not isinstance(self._pending[0][1], torch.Tensor):
            self._tell(*self._pending.popleft())

    def _tell(self, step: int, loss: Any, learning_rate: float | None, indices: Any) -> None:
        value = loss.item() if isinstance(loss, torch.Tensor) else loss
        if self.first_not_finite is None and value is not None and not math.isfinite(value):
            self.first_not_finite = step
        self._teller.tell(step, value, learning_rate, indices)

    def logged(self) -> None:
        """Tell the steps whose losses no event announces. Call it when Trainer has just waited for the device, to log."""
        if self._copied is None:
            self.settle()

    def settle(self) -> None:
        """Tell all steps. It waits for the device."""
        if self._copied is not None:
            torch.accelerator.synchronize()
        self._copied, self._covered, self._copied_since = None, 0, False
        while self._pending:
            self._tell(*self._pending.popleft())
