"""Make a process die when the process that started it dies, even from kill -9. Linux only; on other systems it does nothing.

``python process_guard.py FD [--as-it-is] COMMAND…`` runs COMMAND and guards it for the launcher, which holds the other end of
the pipe that FD reads. Three things hold, whichever process is killed. If the launcher dies, the pipe ends, and the guard kills
all descendants of COMMAND, including daemons, which it has adopted. If the guard dies, COMMAND dies with it, and its orphans
become children of the launcher, which ends them. If COMMAND ends, the guard ends.

No signal ends the guard except those that can't be ignored: a scheduler may send any signal to every process of a job, and the
launcher decides what it means. Signals that were blocked when the guard was started have a meaning: the guard passes them on
to the launcher as SIGTERM. COMMAND starts with the signal settings that the guard started with, blocked signals included.

With ``--as-it-is`` COMMAND is any program, such as a shell, that starts the training: it starts without blocked signals, as its
children inherit them. If such a signal ends COMMAND, that is a notice as well, and the guard waits for the processes that
COMMAND has left behind: one of them may be saving. If COMMAND ends with 0, the guard waits for them, too, and writes a file
`ENDED` into the folder of the launch: the launcher decides how long, and ends them.

It is run as a file, without site-packages: it imports nothing of hf_spot and starts in a few milliseconds. It is a process
of its own because code between fork and exec may hang in a launcher that has threads.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

AS_IT_IS = "--as-it-is"
ENDED = "command-ended"
_NOTICE_FIRST_S = 0.5  # the launcher must know of the notice when it reads the exit code
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


def guard(launcher_fd: int, command: Sequence[str], *, as_it_is: bool = False) -> int:
    """Run ``command`` until it ends. Return its exit code; for a signal, 128 plus its number.

    Args:
        launcher_fd: reading end of a pipe whose other end only the launcher holds.
        command: the command and its arguments.
        as_it_is: the command knows nothing of hf_spot.
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
        if as_it_is:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
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
    code: int | None = None
    while True:
        for pid, status in _ended():  # adopted orphans, too
            if pid == child:
                code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
                if as_it_is and code == 0 and _descendants() and _tell_ended():
                    continue
                if not (as_it_is and os.WIFSIGNALED(status) and os.WTERMSIG(status) in blocked):
                    return code
                pass_on(os.WTERMSIG(status), None)
                time.sleep(_NOTICE_FIRST_S)
        if code is not None and not _descendants():
            return code
        if launcher_fd in select.select([launcher_fd, any_ended], [], [])[0]:
            _kill_all()
        try:
            os.read(any_ended, 4096)
        except BlockingIOError:
            continue


def _tell_ended() -> bool:
    """Tell the launcher that COMMAND has ended with 0 and has left processes behind. Return whether it can be told."""
    try:
        os.close(os.open(os.path.join(os.environ["HF_SPOT_RUNTIME_DIR"], ENDED), os.O_CREAT | os.O_WRONLY, 0o600))
    except (KeyError, OSError):
        return False
    return True


def _ended() -> Iterator[tuple[int, int]]:
    """Yield the id and the status of each child that has ended."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:  # there is none left
            return
        if not pid:
            return
        yield pid, status


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
    as_it_is = sys.argv[2] == AS_IT_IS
    sys.exit(guard(int(sys.argv[1]), sys.argv[2 + as_it_is :], as_it_is=as_it_is))
