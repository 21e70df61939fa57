"""One launch's process and all that come from it: started on a leash, and gone without a trace afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence

import psutil

from hf_spot import process_guard
from hf_spot.notices.signals import held_back

_GONE_S = 10.0


class ProcessTree:
    """Runs a command in a session of its own: neither Ctrl-C nor a signal to the launcher's group reaches it.

    If this process dies, whatever the way, the command dies too. What the command started and left behind is killed by
    `end`, daemons included.

    Args:
        command: to run.
        environ: its environment.
        signals: that wait until the command unblocks them: none of its processes dies of them before it can listen.

    Raises:
        OSError: it can't be started.
    """

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], signals: Iterable[signal.Signals] = ()) -> None:
        process_guard.adopt_orphans()
        self._strangers = set(psutil.Process().children(recursive=True))
        theirs, self._alive = os.pipe()
        guarded = [sys.executable, "-S", "-E", process_guard.__file__, str(theirs), *command]
        try:
            with held_back(signals):
                self._process = subprocess.Popen(guarded, env=dict(environ), start_new_session=True, pass_fds=[theirs])
        except BaseException:
            os.close(self._alive)
            raise
        finally:
            os.close(theirs)

    def wait(self, timeout_s: float) -> int | None:
        """The exit code, or None when the command still runs after ``timeout_s``. A signal counts as 128 and its number."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        return code if code >= 0 else 128 - code

    def end(self) -> None:
        """Kills what is left: the command if it runs, and every descendant."""
        while left := [one for one in psutil.Process().children(recursive=True) if one not in self._strangers]:
            for one in left:
                try:
                    one.send_signal(signal.SIGKILL)
                except psutil.NoSuchProcess:
                    continue
            if psutil.wait_procs(left, timeout=_GONE_S)[1]:
                break  # in the kernel's hands (a dead mount): nothing more can be done from here
        self._process.poll()
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1
