"""Torchrun's agents, those of `hf-spot launch` and those that a program of a launch starts."""

from __future__ import annotations

import contextlib
import functools
import signal

from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler


@functools.cache
def kill_ranks() -> None:
    """Make the agent of this process kill its ranks at once, and end the rest of their process groups as usual.

    When a rank crashes, the agent ends the others with SIGTERM, which they would take for a notice. Being killed is how that
    would have ended them; their child processes still get the SIGTERM. Further calls have no effect.
    """
    close = SubprocessHandler.close

    @functools.wraps(close)
    def kill_and_close(self: SubprocessHandler, death_sig: signal.Signals | None = None) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.proc.kill()
        close(self, death_sig)

    SubprocessHandler.close = kill_and_close  # type: ignore[method-assign]
