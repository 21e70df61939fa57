"""Steps that a training passes over after a rollback: their batches are drawn and dropped.

Without a backward pass there are no gradients, and an optimizer leaves weights without gradients, and their states, as they
are.
Everything else of the step happens as always: events, schedule, counters, log lines (to which it adds a loss of zero).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import Trainer

from hf_spot.policy.rollback import Span
from hf_spot.training.upstream import TRAINING_STEP

# Their training_step calls that of Trainer, and counts nothing of its own.
_KNOWN = ("transformers.trainer", "trl.trainer.sft_trainer", "trl.trainer.dpo_trainer", "trl.trainer.reward_trainer")


class PassedOver:
    """Wraps ``trainer.training_step`` from `watch` to `close`, if there are steps to pass over.

    Args:
        trainer: the Trainer.
        spans: the steps.
    """

    def __init__(self, trainer: Trainer, spans: Sequence[Span]) -> None:
        self._trainer = trainer
        self._spans = spans
        self._plain = TRAINING_STEP.of(trainer)

    def watch(self) -> None:
        """Start wrapping."""
        if self._spans:
            TRAINING_STEP.set(self._trainer, self._training_step)

    def close(self) -> None:
        """Restore the trainer's method."""
        if self._spans:
            TRAINING_STEP.restore(self._trainer)

    def _training_step(self, *args: Any, **kwargs: Any) -> Any:
        step = self._trainer.state.global_step + 1
        if any(step in span for span in self._spans):
            self._trainer.model.train()  # type: ignore[union-attr]
            return torch.zeros((), device=self._trainer.args.device)
        return self._plain(*args, **kwargs)


def why_impossible(trainer: Trainer) -> str | None:
    """Return why steps of this training can't be passed over, for people; None if they can."""
    if trainer.is_deepspeed_enabled:
        return "DeepSpeed's engine steps on its own"
    if getattr(trainer.accelerator, "scaler", None) is not None:
        return "the scaler of fp16=True needs gradients in each step; bf16=True has none"
    kind = next(kind for kind in type(trainer).__mro__ if TRAINING_STEP.name in vars(kind))
    if kind.__module__ not in _KNOWN or not isinstance(TRAINING_STEP.plain(trainer), partial):
        return f"{kind.__name__}.{TRAINING_STEP.name} may count steps of its own"
    return None
