"""What each optimizer step of a custom loop was, which the loop itself does not tell."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from hf_spot.training.data.loaders import Loaders
from hf_spot.training.session.pending_losses import PendingLosses
from hf_spot.training.session.step_teller import StepTeller
from hf_spot.training.upstream import BACKWARD


class LoopSteps:
    """Tells the steps of an optimizer, from construction until `close`.

    A loss is what ``backward`` is called on, a learning rate that of the optimizer's first group, and the samples are those of
    the batches that the loop was given since the step before.

    Args:
        optimizer: the optimizer, possibly wrapped by accelerate.
        loaders: the data loaders of this process.
        teller: gets the steps; None if nothing is compared on this rank.
        stepped: called after each step; returns its number.
    """

    def __init__(self, optimizer: Any, loaders: Loaders, teller: StepTeller | None, stepped: Callable[[], int]) -> None:
        self._losses = None if teller is None else PendingLosses(teller, accumulates=True)
        self._loaders = loaders
        self._stepped = stepped
        self._closing = contextlib.ExitStack()
        self._closing.callback(inner_of(optimizer).register_step_post_hook(self._step_ended).remove)
        if self._losses is not None:
            self._closing.enter_context(BACKWARD.replaced(torch.Tensor, self._watched))

    def _watched(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        losses = self._losses
        assert losses is not None

        def backward(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.numel() == 1:
                losses.add(self.reshape(()))
            return plain(self, *args, **kwargs)

        return backward

    def _step_ended(self, optimizer: Any, *_: Any) -> None:
        step, indices = self._stepped(), self._loaders.take_indices()
        if self._losses is not None:
            rate = optimizer.param_groups[0]["lr"]
            known = not isinstance(rate, torch.Tensor) or rate.device.type == "cpu"  # others would be waited for
            self._losses.step_ended(step, float(rate) if known else None, indices)

    def settle(self) -> None:
        """Tell all steps. It waits for the device."""
        if self._losses is not None:
            self._losses.settle()

    def close(self) -> None:
        """Stop watching. Repeated calls do nothing."""
        self._closing.close()


def inner_of(optimizer: Any) -> Any:
    """Return the optimizer that accelerate has wrapped, or the optimizer itself."""
    return getattr(optimizer, "optimizer", optimizer)


def can_be_watched(optimizer: Any) -> bool:
    """Return whether an optimizer says when it has done a step; those that are not torch's may not."""
    return hasattr(inner_of(optimizer), "register_step_post_hook")
