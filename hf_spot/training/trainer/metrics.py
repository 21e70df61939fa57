"""``spot/…`` metrics: they travel with Trainer's own next log, so that whatever ``report_to`` names shows them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from transformers import Trainer

from hf_spot.training.upstream import ON_LOG


class Metrics:
    """Adds what was measured since the last log to what callbacks hear of the next, until `close`.

    Not to ``state.log_history``, which is part of every checkpoint: an interrupted run's would differ from its twin's, and
    seconds measured on a machine are no part of a training. Trackers put ``train/`` in front, as of all that is not an
    evaluation's.

    Args:
        trainer: whose log it is.
        gauges: asked at each log, by name; None is left out.
    """

    def __init__(self, trainer: Trainer, gauges: dict[str, Callable[[], float | None]]) -> None:
        self._trainer = trainer
        self._gauges = gauges
        self._fresh: deque[tuple[str, float]] = deque()
        if trainer.args.process_index == 0 and ON_LOG.trouble() is None:  # no other rank reports
            self._on_log = ON_LOG.of(trainer.callback_handler)
            ON_LOG.set(trainer.callback_handler, self._logged)

    def put(self, name: str, value: float | None) -> None:
        """For the next log, from any thread; None is left out."""
        if value is not None:
            self._fresh.append((f"spot/{name}", value))

    def _logged(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> Any:
        for name, ask in self._gauges.items():
            self.put(name, ask())
        found = {}
        while self._fresh:
            name, value = self._fresh.popleft()
            found[name] = round(value, 6)
        shown = {**logs, **found}
        try:
            return self._on_log(args, state, control, shown, **kwargs)
        finally:
            # Callbacks may change what `train()` returns: PrinterCallback takes ``total_flos`` out of it.
            logs.clear()
            logs.update({name: value for name, value in shown.items() if name not in found})

    def close(self) -> None:
        """Gives the trainer its method back."""
        ON_LOG.restore(self._trainer.callback_handler)
