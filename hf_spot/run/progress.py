"""What a person sees: a bar for transfers, quiet when nobody looks at a terminal, and log lines that no bar swallows."""

from __future__ import annotations

import logging
import os
import sys

from tqdm.auto import tqdm

from hf_spot.storage.store import Progress

log = logging.getLogger("hf_spot")


def bar(what: str, size_bytes: int) -> Progress:
    """A callback that shows how much of ``size_bytes`` has moved, and clears the line at the end.

    Args:
        what: one word or two.
        size_bytes: of everything that is to be moved.
    """
    shown = tqdm(total=size_bytes, unit="B", unit_scale=True, desc=f"hf-spot {what}", disable=None, leave=False)

    def moved(count: int) -> None:
        shown.update(count)
        if shown.n >= size_bytes:
            shown.close()

    return moved


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
