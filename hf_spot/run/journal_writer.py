"""Write to the journal from a thread of its own: the store may be slow to answer, or never answer again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from hf_spot.errors import SpotError
from hf_spot.run.journal import ENDINGS
from hf_spot.run.run import Run
from hf_spot.run.webhook import Hook
from hf_spot.storage.threads import Workers

log = logging.getLogger("hf_spot")

T = TypeVar("T")


class JournalWriter:
    """Performs one request after the other, in the order of the calls.

    Args:
        run: whose journal is written.
        hook: the user's webhook, to which the end of a launch is posted too; None posts nothing.
    """

    def __init__(self, run: Run, hook: Hook | None = None) -> None:
        self._run = run
        self._hook = hook
        self._worker = Workers(1, "hf_spot-journal-writer")

    def record(self, kind: str, data: dict[str, Any], *, patience_s: float | None = None) -> None:
        """Append an entry, and wait for it.

        Errors are logged, not raised: a missing entry must not change how a training ends.

        Args:
            kind: of the entry.
            data: JSON values.
            patience_s: how long to wait at most; None waits as long as it takes, 0 does not wait.
        """
        if kind in ENDINGS and self._hook is not None:
            self._hook.tell(_in_words(kind, data))
        written = self._worker.submit(self._write, kind, data)
        if not wait([written], patience_s).done and patience_s:
            log.error("%r could not be written to the journal: %s does not answer", kind, self._run.url)

    def ask(self, request: Callable[[], T], *, patience_s: float | None = None) -> Future[T] | None:
        """Perform a request after all entries recorded before it.

        Args:
            request: reads from the store.
            patience_s: how long to wait at most; None waits as long as it takes.

        Returns:
            The finished request, or None if there was no answer in time.
        """
        asked = self._worker.submit(request)
        return asked if wait([asked], patience_s).done else None

    def close(self) -> None:
        """Take no more requests, and wait for nothing."""
        self._worker.shutdown(wait=False)

    def _write(self, kind: str, data: dict[str, Any]) -> None:
        try:
            self._run.record(kind, data)
        except SpotError as error:
            log.error("%r could not be written to the journal: %s", kind, error)
        except Exception as error:  # of a library that the store uses: the training continues
            log.error("%r could not be written to the journal: %s: %s", kind, type(error).__name__, error)
            log.debug("writing %r to the journal", kind, exc_info=True)


def _in_words(kind: str, data: dict[str, Any]) -> str:
    text = f"{kind} at step {data['timing']['step']}"
    if "error" in data:
        text += f", by {data['error']}"
    return f"{text}; step {data['committed_step']} is committed" if "committed_step" in data else text
