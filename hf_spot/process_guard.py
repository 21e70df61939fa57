"""A leash: a process on it dies when the one that started it dies, even of kill -9. Linux only; elsewhere it does nothing.

``python process_guard.py PID COMMAND…`` runs COMMAND and guards it for the launcher, process PID. Three things hold, whoever is
killed: when the launcher dies, the guard kills all that came from COMMAND, daemons included, which it had adopted; when
the guard dies, COMMAND dies with it, and its orphans go to the launcher, which ends them; and the guard ends with COMMAND.

It is run as a file, without site-packages: it imports nothing of hf_spot and is there in a few milliseconds. It is a process
of its own because code between fork and exec may hang in a launcher that has threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_PR_SET_CHILD_SUBREAPER = 36
_LAUNCHER_DIED = signal.SIGUSR2


def tie(holder: int | None = None) -> None:
    """From now on this process dies with the thread that started it; the tie survives an exec.

    Args:
        holder: process that must still be alive: it may have died before the leash was on.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if holder is not None and not _is_alive(holder):
        os.kill(os.getpid(), signal.SIGKILL)


def adopt_orphans() -> None:
    """Descendants whose parent dies become children of this process, so that none gets away."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def guard(launcher: int, command: Sequence[str]) -> int:
    """Runs ``command`` until it ends; its exit code, a signal as 128 and its number."""
    adopt_orphans()
    signal.signal(_LAUNCHER_DIED, _kill_all)
    # A scheduler may signal every process of a job. The launcher decides what that means.
    others = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.signal(one, signal.SIG_IGN) for one in others]
    _prctl(_PR_SET_PDEATHSIG, _LAUNCHER_DIED)
    if not _is_alive(launcher):
        return 1
    guarding = os.getpid()
    child = os.fork()
    if child == 0:
        tie(guarding)
        for one, handler in zip(others, before, strict=True):
            signal.signal(one, handler)
        signal.signal(_LAUNCHER_DIED, signal.SIG_DFL)
        os.execvp(command[0], list(command))
    while True:
        ended, status = os.wait()  # orphans too
        if ended == child:
            return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def _kill_all(number: int, frame: FrameType | None) -> None:
    while descendants := _descendants():
        for pid in descendants:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:
            break
    os._exit(1)


def _descendants() -> list[int]:
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    # "pid (command) state parent …", and the command may hold anything
                    parents[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
            except OSError:
                continue
    found = [os.getpid()]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(guard(int(sys.argv[1]), sys.argv[2:]))
