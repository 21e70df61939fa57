"""Make a process die when the process that started it dies, even from kill -9. Linux only; on other systems it does nothing.

``python process_guard.py FD COMMAND…`` runs COMMAND and guards it for the launcher, which holds the other end of the pipe that
FD reads. Three things hold, whichever process is killed. If the launcher dies, the pipe ends, and the guard kills all
descendants of COMMAND, including daemons, which it has adopted. If the guard dies, COMMAND dies with it, and its orphans become
children of the launcher, which ends them. If COMMAND ends, the guard ends.

No signal ends the guard except those that can't be ignored: a scheduler may send any signal to every process of a job, and the
launcher decides what it means. Signals that were blocked when the guard was started have a meaning: the guard passes them on
to the launcher as SIGTERM. COMMAND starts with the signal settings that the guard started with, blocked signals included.

It is run as a file, without site-packages: it imports nothing of hf_spot and starts in a few milliseconds. It is a process
of its own because code between fork and exec may hang in a launcher that has threads.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_PR_SET_CHILD_SUBREAPER = 36
_NOT_IGNORED = {signal.SIGCHLD, signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV, signal.SIGFPE, signal.SIGILL, signal.SIGBUS}


def tie(holder: int | None = None) -> None:
    """Make this process die with the thread that started it, from now on, also after an exec.

    Args:
        holder: the process that started this one; if it has already died, this process is killed at once.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if holder is not None and not _is_alive(holder):
        os.kill(os.getpid(), signal.SIGKILL)


def adopt_orphans() -> None:
    """Make descendants whose parent dies children of this process, so that none escapes."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def guard(launcher_fd: int, command: Sequence[str]) -> int:
    """Run ``command`` until it ends. Return its exit code; for a signal, 128 plus its number.

    Args:
        launcher_fd: reading end of a pipe whose other end only the launcher holds.
        command: the command and its arguments.
    """
    adopt_orphans()
    launcher, blocked = os.getppid(), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    before: dict[int, Any] = {one: signal.signal(one, signal.SIG_IGN) for one in signal.valid_signals() - _NOT_IGNORED}
    os.set_inheritable(launcher_fd, False)
    guarding = os.getpid()
    child = os.fork()
    if child == 0:
        tie(guarding)
        for one, handler in before.items():
            signal.signal(one, signal.SIG_DFL if handler is None else handler)
        os.execvp(command[0], list(command))
    any_ended, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    os.set_blocking(any_ended, False)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)

    def pass_on(number: int, frame: FrameType | None) -> None:
        if os.getppid() == launcher:
            os.kill(launcher, signal.SIGTERM)

    for one in blocked & before.keys():
        if before[one] is not signal.SIG_IGN:  # nohup ignores SIGHUP, and that must stay so
            signal.signal(one, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    while True:
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:  # adopted orphans, too
            if ended[0] == child:
                return os.WEXITSTATUS(ended[1]) if os.WIFEXITED(ended[1]) else 128 + os.WTERMSIG(ended[1])
        if launcher_fd in select.select([launcher_fd, any_ended], [], [])[0]:
            _kill_all()
        try:
            os.read(any_ended, 4096)
        except BlockingIOError:
            continue


def _kill_all() -> None:
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
                    # "pid (command) state parent …", where the command may contain any characters
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
