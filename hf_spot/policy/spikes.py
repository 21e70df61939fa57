"""Which losses stand out from those before them. Pure, but for the losses that it keeps."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median

_WINDOW = 200  # losses to compare with
_FEWEST = 50
_TIMES = 10.0  # deviations
_OF_MEDIAN = 0.5  # and at least this share of the median above it: a loss that hardly varies has tiny deviations
_TO_SIGMA = 1.4826  # a median absolute deviation times this is the standard deviation of a normal distribution
_QUIET_STEPS = 20  # after a spike: its neighbours belong to it


@dataclass(frozen=True)
class Spike:
    """A loss that stands out.

    Args:
        step: of the loss.
        loss: the loss.
        usual: the median of the losses before it.
        losses: how many those are.
    """

    step: int
    loss: float
    usual: float
    losses: int

    def in_words(self) -> str:
        """Return the spike for people, without its samples."""
        usual = f"; the median of the {self.losses} steps before is {self.usual:.4g}" if self.losses else ""
        return f"step {self.step}: the loss is {self.loss:.4g}{usual}"


class Spikes:
    """Compares each loss of one rank with the median of the losses before it, in median absolute deviations."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._quiet_until = 0

    def look(self, step: int, loss: float | None) -> Spike | None:
        """Return the spike that a loss is; None if it is none, or too little is known.

        Args:
            step: its number.
            loss: of the step; None if unknown.
        """
        if loss is None:
            return None
        usual = median(self._losses) if self._losses else math.nan
        found = None
        if step > self._quiet_until and self._is_spike(loss, usual):
            found = Spike(step, loss, usual, len(self._losses))
            self._quiet_until = step + _QUIET_STEPS
        if math.isfinite(loss):
            self._losses.append(loss)
        return found

    def _is_spike(self, loss: float, usual: float) -> bool:
        if not math.isfinite(loss):
            return True
        if len(self._losses) < _FEWEST or loss <= usual + _OF_MEDIAN * abs(usual):  # cheap, and nearly always enough
            return False
        deviation = median(abs(one - usual) for one in self._losses)
        return loss > usual + _TIMES * _TO_SIGMA * deviation
