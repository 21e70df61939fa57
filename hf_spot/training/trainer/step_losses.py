"""What each step of a Trainer was, as `hf_spot.training.session.step_teller` compares it after a kill.

Trainer adds losses up on the device, and reads the sum when it logs: the loss of each step is taken where Trainer gets it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer

from hf_spot.training.session.pending_losses import PendingLosses
from hf_spot.training.session.step_teller import StepTeller
from hf_spot.training.upstream import TRAINING_STEP


class StepLosses:
    """Collects what a step was, and tells it once its loss is known, from `watch` to `close`.

    Args:
        trainer: the Trainer.
        teller: gets the steps.
    """

    def __init__(self, trainer: Trainer, teller: StepTeller) -> None:
        self._trainer = trainer
        self._losses = PendingLosses(teller, accumulates=trainer.args.gradient_accumulation_steps > 1)
        self._indices: Any = None
        self._told = 0
        self._plain = TRAINING_STEP.of(trainer)  # perhaps the script's own

    @property
    def first_not_finite(self) -> int | None:
        """Return the first step whose loss is known to be no finite number; None if there is none."""
        return self._losses.first_not_finite

    def watch(self) -> None:
        """Start wrapping. Call it before the training begins."""
        TRAINING_STEP.set(self._trainer, self._training_step)

    def close(self) -> None:
        """Restore the trainer's method."""
        TRAINING_STEP.restore(self._trainer)

    def _training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = self._plain(*args, **kwargs)
        if isinstance(loss, torch.Tensor):
            self._losses.add(loss)
        return loss

    def step_begins(self) -> None:
        """Forget the losses of a step that was abandoned."""
        self._losses.drop()

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
        self._told = step
        self._losses.step_ended(step, learning_rate, self._indices)
        self._indices = None

    def logged(self) -> None:
        """Tell the steps whose losses no event announces. Call it when Trainer has just waited for the device, to log."""
        self._losses.logged()

    def settle(self) -> None:
        """Tell all steps. It waits for the device."""
        self._losses.settle()
