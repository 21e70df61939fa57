"""The gate in front of everything that changes the state of a training: it opens when the newest save has its copies.

These pass it: each step of an optimizer (`StepGate`), code that asks for memory (`HiddenWrites`), and whoever calls
`StateGate.pass_through`: the next save, callbacks of others, the end of a training.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import torch

from hf_spot.training.saving.hidden_writes import HiddenWrites
from hf_spot.training.saving.later_copies import LaterCopies
from hf_spot.training.saving.step_gate import StepGate


class StateGate:
    """One gate for one training. It is open until `shut`."""

    def __init__(self) -> None:
        self._later: LaterCopies | None = None
        self._thread = 0
        self._process = os.getpid()
        self._hidden = HiddenWrites(self.finish)
        self._steps: StepGate | None = None
        self._waited_s = 0.0
        self._on_opened: Callable[[float], None] = lambda waited_s: None

    @property
    def is_shut(self) -> bool:
        """Return whether something may still have to be copied."""
        return self._later is not None

    def watch_steps(self) -> None:
        """Hold back the steps of all optimizers of this process while the gate is shut, until `close`."""
        if self._steps is None:
            self._steps = StepGate(self.pass_through)

    def step_begins(self) -> None:
        """Record that a step of the training begins, in which optimizers may make steps."""
        if self._steps is not None:
            self._steps.step_begins()

    def stepped(self) -> list[torch.optim.Optimizer]:
        """Return the optimizers whose newest steps came through this gate."""
        return [] if self._steps is None else self._steps.stepped()

    def shut(self, later: LaterCopies, on_opened: Callable[[float], None]) -> None:
        """Shut the gate. The training thread must call it.

        Args:
            later: what must be copied before it opens.
            on_opened: called with the seconds that the training thread waited.
        """
        self._thread, self._waited_s, self._on_opened = threading.get_ident(), 0.0, on_opened
        self._later = later
        self._hidden.watch(later.storages)

    def finish(self) -> None:
        """Return when everything is copied. The gate stays shut: only the training thread can open it."""
        if (later := self._later) is None or os.getpid() != self._process:  # a forked child has a state of its own
            return
        began = time.monotonic()
        later.finish()
        if threading.get_ident() == self._thread:
            self._waited_s += time.monotonic() - began

    def pass_through(self) -> None:
        """Return when the state may change."""
        if (later := self._later) is None or os.getpid() != self._process:
            return
        self.finish()
        if threading.get_ident() == self._thread:
            later.confirm()
            self._later = None
            self._hidden.close()
            self._on_opened(self._waited_s)

    def confirm_without_training(self, later: LaterCopies) -> None:
        """Confirm copies in another thread, because the training thread does not come through for a long time."""
        later.finish()
        later.confirm()
        self._hidden.close()

    def close(self) -> None:
        """Open the gate for ever."""
        self.pass_through()
        self._hidden.close()
        if self._steps is not None:
            self._steps.close()
            self._steps = None
