"""Holds back every step of an optimizer of this process until the state is copied, and knows who has stepped.

torch calls a global hook before each step, also of optimizers within wrappers, and of those that step in the backward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook


class StepGate:
    """Watches from construction until `close`.

    Args:
        wait: called before each step, in the thread that makes it; returns when the step may change the state.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait
        self._stepped: dict[int, weakref.ref[torch.optim.Optimizer]] = {}
        self._handle = register_optimizer_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._stepped[id(optimizer)] = weakref.ref(optimizer)
        self._wait()

    def step_begins(self) -> None:
        """Forget who has stepped: what matters at a save is the step before it."""
        self._stepped.clear()

    def stepped(self) -> list[torch.optim.Optimizer]:
        """Return the optimizers that were held back here since `step_begins`: they will be at their next step, too."""
        return [found for one in list(self._stepped.values()) if (found := one()) is not None]

    def close(self) -> None:
        """Stop watching."""
        self._handle.remove()
