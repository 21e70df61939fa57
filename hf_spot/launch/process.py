"""One launch's process and all its descendants: they die with the launcher, and none is left after the launch."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import psutil

from hf_spot import process_guard
from hf_spot.launch.bell import Bell
from hf_spot.notices.signals import held_back

_GONE_S = 10.0


class ProcessTree:
    """Runs a command in a session of its own, so that neither Ctrl-C nor a signal to the launcher's group reaches it.

    If this process dies, for whatever reason, the command dies too. `end` kills all processes that the command has left behind,
    daemons included.

    Args:
        command: to run.
        environ: its environment.
        signals: blocked until the command unblocks them, so that no process dies of them before it has a handler.
        as_it_is: the command knows nothing of that: they are not blocked, and one that ends it is a notice.
        apart: it is started while another one runs, of which it is no part, and waits until `begin`.
        pass_fds: descriptors that the command inherits.
        others: returns processes that are not the command's, though started after it.

    Raises:
        OSError: it can't be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        signals: Iterable[signal.Signals] = (),
        *,
        as_it_is: bool = False,
        apart: bool = False,
        pass_fds: Sequence[int] = (),
        others: Callable[[], Collection[psutil.Process]] = tuple,
    ) -> None:
        process_guard.adopt_orphans()
        self._is_apart = apart
        self._others = others
        self._strangers = set() if apart else set(psutil.Process().children(recursive=True))
        theirs, self._alive = os.pipe()
        guarded = [sys.executable, "-S", "-E", process_guard.__file__, str(theirs)]
        guarded += [*([process_guard.AS_IT_IS] if as_it_is else []), *command]
        try:
            with held_back(signals):
                self._process = subprocess.Popen(
                    guarded, env=dict(environ), start_new_session=True, pass_fds=[theirs, *pass_fds]
                )
        except BaseException:
            os.close(self._alive)
            raise
        finally:
            os.close(theirs)
        self._ended: int | None = None  # can be read from once the process has ended
        with contextlib.suppress(OSError, AttributeError):  # Linux alone has it, from 5.3 on
            self._ended = os.pidfd_open(self._process.pid)

    def wait(self, timeout_s: float, bell: Bell | None = None) -> int | None:
        """Return the exit code; None if the command still runs after ``timeout_s``, or when the bell rings. For a signal, 128
        plus its number."""
        if bell is not None and self._ended is not None:
            poll = select.poll()
            for one in (bell, self._ended):
                poll.register(one, select.POLLIN)
            poll.poll(timeout_s * 1000)
            bell.silence()
            timeout_s = 0.0
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        return code if code >= 0 else 128 - code

    def begin(self, others: Callable[[], Collection[psutil.Process]]) -> None:
        """Be the command that runs, from now on: it waited apart until now.

        Args:
            others: as at construction.
        """
        own = set(self.processes())
        self._is_apart, self._others = False, others
        self._strangers = set(psutil.Process().children(recursive=True)) - own

    def processes(self) -> list[psutil.Process]:
        """Return the guard, the command, and every descendant."""
        if not self._is_apart:
            others = set(self._others())
            return [one for one in psutil.Process().children(recursive=True) if one not in self._strangers | others]
        try:
            guard = psutil.Process(self._process.pid)
            return [guard, *guard.children(recursive=True)] if self._process.poll() is None else []
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """Kill the command, if it still runs, and every descendant, and wait for none of them: `end` does."""
        _kill(self.processes())

    def end(self) -> None:
        """Kill the command, if it still runs, and every descendant, and wait until they are gone."""
        while left := self.processes():
            _kill(left)
            if psutil.wait_procs(left, timeout=_GONE_S)[1]:
                break  # stuck in the kernel (a dead mount): it can't be killed
        self._process.poll()
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1
        if self._ended is not None:
            os.close(self._ended)
            self._ended = None


def _kill(processes: Iterable[psutil.Process]) -> None:
    for one in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGKILL)
