"""``spot/…`` metrics, added to Trainer's next log line, so that every tracker in ``report_to`` shows them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from transformers import Trainer

from hf_spot.training.upstream import ON_LOG


class Metrics:
    """Adds measurements to the log lines that callbacks get, until `close`.

    They are not added to ``state.log_history``, which is part of every checkpoint and must be the same in an interrupted and an
    uninterrupted run. Trackers put ``train/`` before the names, as they do for everything except evaluations.

    Args:
        trainer: the Trainer.
        gauges: functions by name, called at each log line; None is left out.
    """

    def __init__(self, trainer: Trainer, gauges: dict[str, Callable[[], float | None]]) -> None:
        self._trainer = trainer
        self._gauges = gauges
        self._fresh: deque[tuple[str, float]] = deque()
        if trainer.args.process_index == 0 and ON_LOG.trouble() is None:  # only this rank reports
            self._on_log = ON_LOG.of(trainer.callback_handler)
            ON_LOG.set(trainer.callback_handler, self._logged)

    def put(self, name: str, value: float | None) -> None:
        """Add a value to the next log line; None is left out. Any thread may call it."""
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
            # Callbacks may change what `train()` returns: PrinterCallback removes ``total_flos``.
            logs.clear()
            logs.update({name: value for name, value in shown.items() if name not in found})

    def close(self) -> None:
        """Restore the trainer's method."""
        ON_LOG.restore(self._trainer.callback_handler)
