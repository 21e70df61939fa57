"""Trainings of a launch that hf_spot can't protect: named while they run, and not only at their end."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hf_spot.log import warn_for_all
from hf_spot.runtime import Runtime

_SAY_AFTER_S = 20.0  # a shorter training is soon done again
HOW_TO_PROTECT = (
    "Trainer is protected once it trains; in a custom loop, save with hf_spot.SpotCheckpointManager(), in one with accelerate "
    "with SpotCheckpointManager.for_accelerator(accelerator)"
)


def watch_steps() -> None:
    """Warn about a training of this process that hf_spot takes no part in, once it has trained for some time."""
    if Runtime.from_environ(os.environ) is None:
        return
    began_at: float | None = None
    has_looked = False

    def look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal began_at, has_looked
        if has_looked:  # torch goes through its hooks at this moment: one that removed itself would end the step with an error
            return
        now = time.monotonic()
        if began_at is None:
            began_at = now
        if now - began_at < _SAY_AFTER_S:
            return
        has_looked = True
        runtime = Runtime.from_environ(os.environ)  # not earlier: a warm spare has imported torch before its launch began
        if runtime is not None and not runtime.training_path.exists():
            warn_for_all(
                "this script trains without hf_spot: nothing of it is saved, and after an interruption it would begin from the "
                "start. %s",
                HOW_TO_PROTECT,
            )

    register_optimizer_step_pre_hook(look)
