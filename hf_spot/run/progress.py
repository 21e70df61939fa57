"""Show a transfer's progress: a bar in a terminal, and nothing elsewhere."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping

from tqdm.auto import tqdm


class Bar:
    """A `Progress` that shows how much of ``size_bytes`` has moved. It clears its line when all of it has moved, or on `close`.

    Nothing is shown if standard error is not a terminal, or if Hugging Face's own bars are switched off
    (``HF_HUB_DISABLE_PROGRESS_BARS``, ``huggingface_hub.utils.disable_progress_bars``, ``transformers.utils.logging.
    disable_progress_bar``).

    Args:
        what: one word or two.
        size_bytes: total to move.
        delay_s: a transfer that takes no longer than this is not shown.
        hidden: show nothing.
    """

    def __init__(self, what: str, size_bytes: int, *, delay_s: float = 0.0, hidden: bool = False) -> None:
        self._size_bytes = size_bytes
        self._lock = threading.Lock()
        self._shown = tqdm(
            total=size_bytes,
            unit="B",
            unit_scale=True,
            desc=f"hf-spot {what}",
            disable=True if hidden or _switched_off(os.environ) else None,
            leave=False,
            delay=delay_s,
        )

    def __call__(self, count: int) -> None:
        """Add ``count`` bytes, as `Progress` does; a negative number for bytes that must be moved again."""
        with self._lock:
            self._shown.update(count)
            if self._shown.n >= self._size_bytes:
                self._shown.close()  # from now on nothing is shown

    def close(self) -> None:
        """Clear the line. Repeated calls do nothing."""
        with self._lock:  # another thread could draw it again
            self._shown.close()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _switched_off(environ: Mapping[str, str]) -> bool:
    hub = sys.modules.get("huggingface_hub.utils")  # if it is not imported, only the variable can have switched bars off
    if hub is not None:
        return bool(hub.are_progress_bars_disabled())
    return environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE")
