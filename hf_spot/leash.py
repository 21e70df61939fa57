"""A leash: a process on it dies when the one that started it dies, even of kill -9. Linux only; elsewhere it does nothing.

``python leash.py PID COMMAND…`` puts COMMAND on a leash held by process PID. It is run as a file, so it imports nothing of
hf_spot, and it takes the way of an exec because code between fork and exec may hang in a process that has threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_PR_SET_CHILD_SUBREAPER = 36


def tie(holder: int | None = None) -> None:
    """From now on this process dies with the thread that started it; the tie survives an exec.

    Args:
        holder: process that must still be alive: it may have died before the leash was on.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if holder is not None:
        try:
            os.kill(holder, 0)
        except ProcessLookupError:
            os.kill(os.getpid(), signal.SIGKILL)


def adopt_orphans() -> None:
    """Descendants whose parent dies become children of this process, so that none gets away."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    tie(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
