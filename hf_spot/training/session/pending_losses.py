"""The loss of each step, without waiting for the device.

The loss of each step is copied to pinned memory on the stream that computes it, and is read when an event shows that the copy
has arrived, usually one or two steps later.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch

from hf_spot.training.saving.device import in_order
from hf_spot.training.session.step_teller import StepTeller

_SLOTS = 256  # losses on their way; a host is never so many steps ahead of its device
_Pending = tuple[int, Any, Any, Any]  # step, loss (a number, a tensor, or None), learning rate, indices


class PendingLosses:
    """Adds up the losses of a step's micro-batches, and tells what each step was once its loss is known.

    Args:
        teller: gets the steps.
        accumulates: whether a step may have several micro-batches.
    """

    def __init__(self, teller: StepTeller, *, accumulates: bool) -> None:
        self._teller = teller
        self._accumulates = accumulates
        self._loss: torch.Tensor | None = None
        self._pending: deque[_Pending] = deque()
        self._slots: list[torch.Tensor] = []
        self._used = 0
        self._copied: torch.Event | None = None  # announces the copies of so many pending steps
        self._covered = 0
        self._copied_since = False
        self.first_not_finite: int | None = None  # a step

    def add(self, loss: torch.Tensor) -> None:
        """Add the loss of a micro-batch of the step under way."""
        if self._loss is not None:
            self._loss = self._loss + loss.detach()
        else:  # a compiled model may write the next micro-batch's loss to the same memory
            self._loss = loss.detach().clone() if self._accumulates else loss.detach()

    def drop(self) -> None:
        """Forget the losses of a step that was abandoned."""
        self._loss = None

    def step_ended(self, step: int, learning_rate: float | None, indices: Any) -> None:
        """Record the end of a step, and tell the steps whose losses are known by now.

        Args:
            step: its number.
            learning_rate: with which it was done; None if unknown.
            indices: of its samples on this rank; None if unknown.
        """
        loss, self._loss = self._loss, None
        if loss is None or loss.numel() != 1:
            found: Any = None
        elif loss.device.type == "cpu":
            found = loss.item()
        else:
            found = self._copy(loss) if in_order(loss.device) else loss.clone()
        self._pending.append((step, found, learning_rate, indices))
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
        """Tell the steps whose losses no event announces. Call it when something else has just waited for the device."""
        if self._copied is None:
            self.settle()

    def settle(self) -> None:
        """Tell all steps. It waits for the device."""
        if self._copied is not None:
            torch.accelerator.synchronize()
        self._copied, self._covered, self._copied_since = None, 0, False
        while self._pending:
            self._tell(*self._pending.popleft())
