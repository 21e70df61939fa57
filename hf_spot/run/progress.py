"""What a person sees: a bar for transfers, quiet when nobody looks at a terminal, and log lines that no bar swallows."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Mapping

from tqdm.auto import tqdm

log = logging.getLogger("hf_spot")


class Bar:
    """A `Progress` that shows how much of ``size_bytes`` has moved, and clears its line when all of it has, or on `close`.

    Nothing is shown where standard error is no terminal, and where Hugging Face's own bars are switched off
    (``HF_HUB_DISABLE_PROGRESS_BARS``, ``huggingface_hub.utils.disable_progress_bars``, ``transformers.utils.logging.
    disable_progress_bar``).

    Args:
        what: one word or two.
        size_bytes: of everything that is to be moved.
        delay_s: a transfer that takes no longer is not shown.
    """

    def __init__(self, what: str, size_bytes: int, *, delay_s: float = 0.0) -> None:
        self._size_bytes = size_bytes
        self._lock = threading.Lock()
        self._shown = tqdm(
            total=size_bytes,
            unit="B",
            unit_scale=True,
            desc=f"hf-spot {what}",
            disable=True if _switched_off(os.environ) else None,
            leave=False,
            delay=delay_s,
        )

    def __call__(self, count: int) -> None:
        """As `Progress`; below zero for what has to be moved again."""
        with self._lock:
            self._shown.update(count)
            if self._shown.n >= self._size_bytes:
                self._shown.close()  # from now on nothing is shown

    def close(self) -> None:
        """Clears the line. More than once is no harm."""
        with self._lock:  # another thread could draw it anew
            self._shown.close()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _switched_off(environ: Mapping[str, str]) -> bool:
    hub = sys.modules.get("huggingface_hub.utils")  # who has not imported it, has switched nothing off but by the variable
    if hub is not None:
        return bool(hub.are_progress_bars_disabled())
    return environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE")


def alert(text: str) -> None:
    """Logs a warning that stands out, and writes it to standard error where the log would keep it to itself."""
    text = f">>> {text} <<<"
    if log.isEnabledFor(logging.WARNING):
        log.warning("%s", text)
    else:
        AboveBars().handle(log.makeRecord(log.name, logging.WARNING, __file__, 0, text, (), None))


class AboveBars(logging.Handler):
    """Writes hf_spot's log to standard error, each line on a line of its own above the bars of a training: Trainer's would
    have it begin behind what it has drawn. In a notebook it goes into the cell that runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("hf-spot: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """As `logging` calls it."""
        try:
            text = self.format(record)
            if sys.stderr.isatty():
                text = f"\r\033[K{text}"  # the bar may be another process's
            if getattr(tqdm, "_instances", None):
                tqdm.write(text, file=sys.stderr)
            else:
                print(text, file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def show_log() -> None:
    """What happens to a run has to be seen even in a script that never set up logging."""
    if not log.handlers and not logging.getLogger().handlers:
        log.addHandler(AboveBars())
        log.setLevel(logging.INFO if int(os.environ.get("RANK", "0")) == 0 else logging.WARNING)
