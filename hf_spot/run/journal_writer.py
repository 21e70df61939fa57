"""Tells the journal, and who listens, what becomes of a training, one thing after the other."""

from __future__ import annotations

import logging
from concurrent.futures import wait
from typing import Any

from hf_spot.errors import SpotError
from hf_spot.run.journal import ENDINGS
from hf_spot.run.run import Run
from hf_spot.run.webhook import Hook
from hf_spot.storage.threads import Workers

log = logging.getLogger("hf_spot")


class JournalWriter:
    """Writes from a thread of its own: a journal may be slow to answer, or never answer again.

    Args:
        run: that is told of.
        hook: of the user; an ending is told there, too.
    """

    def __init__(self, run: Run, hook: Hook) -> None:
        self._run = run
        self._hook = hook
        self._worker = Workers(1, "hf_spot-journalist")

    def record(self, kind: str, data: dict[str, Any], *, patience_s: float | None = None) -> None:
        """Appends an entry, and waits ``patience_s`` for it; None waits as long as it takes. Trouble is logged."""
        if kind in ENDINGS:
            self._hook.tell(_in_words(kind, data))
        told = self._worker.submit(self._tell, kind, data)
        if not wait([told], patience_s).done and patience_s:
            log.error("the journal could not be told %r: %s does not answer", kind, self._run.url)

    def close(self) -> None:
        """Takes no more, and waits for nothing."""
        self._worker.shutdown(wait=False)

    def _tell(self, kind: str, data: dict[str, Any]) -> None:
        try:
            self._run.record(kind, data)
        except SpotError as error:
            log.error("the journal could not be told %r: %s", kind, error)
        except Exception:
            log.exception("the journal could not be told %r", kind)


def _in_words(kind: str, data: dict[str, Any]) -> str:
    told = f"{kind} at step {data['timing']['step']}"
    if "error" in data:
        told += f", by {data['error']}"
    return f"{told}; step {data['committed_step']} is committed" if "committed_step" in data else told
