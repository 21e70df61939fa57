"""A signal as a notice: what Kubernetes, Slurm, SageMaker and an impatient operator have in common."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta, timezone
from types import FrameType

from hf_spot.errors import ConfigError
from hf_spot.notices.notice import NoticeKind, PreemptionNotice

log = logging.getLogger("hf_spot")

# The first two can't be caught. After the others the faulty instruction runs again, so a handler that returns hangs.
_UNUSABLE = {"SIGKILL", "SIGSTOP", "SIGSEGV", "SIGFPE", "SIGILL", "SIGBUS"}

# A terminal sends SIGINT to every process, and a launcher such as torchrun passes its own on: the same Ctrl-C, heard twice.
_SAME_KEY_S = 1.0


class SignalSource:
    """Hears signals sent to this process, from `install` to `restore`.

    The first signal is the notice; further ones, of whatever name, repeat it and raise `count`. A handler that the
    program had set up before is called as well.

    Args:
        signals: their names.
        grace_s: seconds from the signal to the kill, if known; the notice's deadline follows from it.
        now: the wall clock; called inside a signal handler.

    Raises:
        ConfigError: a name is no signal that can be used, or ``grace_s`` is not positive.
    """

    name = "signal"
    interval_s = 0.1

    def __init__(
        self,
        signals: Iterable[str] = ("SIGTERM", "SIGUSR1"),
        grace_s: float | None = None,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
    ) -> None:
        self._signals = [_signal(name) for name in signals]
        if not self._signals:
            raise ConfigError("no signal is named for the source 'signal'", hint="--signals SIGTERM,SIGUSR1")
        if grace_s is not None and not grace_s > 0:
            raise ConfigError(f"grace_s={grace_s} must be positive", hint="leave it out when it is not known")
        self.where = ",".join(one.name for one in self._signals)
        self._grace_s = grace_s
        self._now = now
        # Appending to a deque is atomic and takes no lock: a handler may interrupt anything, another handler included.
        self._heard: deque[tuple[str, datetime]] = deque()
        self._earlier: dict[int, object] = {}
        self._pid = 0

    @property
    def count(self) -> int:
        """How many signals were heard since the start, or since `reset`."""
        return len(self._heard)

    def count_of(self, name: str) -> int:
        """How many of them were the signal ``name``."""
        return sum(heard == name for heard, _ in self._heard.copy())

    def install(self) -> None:
        """Starts listening. Outside the main thread Python can't: then this logs a warning and does nothing else."""
        if threading.current_thread() is not threading.main_thread():
            log.warning("signals (%s) are not heard: training does not run in the main thread", self.where)
            return
        if self._pid:
            return
        self._pid = os.getpid()
        for one in self._signals:
            self._earlier[one] = signal.getsignal(one)
            signal.signal(one, self._handle)

    def restore(self) -> None:
        """Stops listening and puts the earlier handlers back, unless someone has put another above ours since."""
        if not self._pid or threading.current_thread() is not threading.main_thread():
            return
        self._pid = 0
        for one in self._signals:
            earlier = self._earlier[one]
            if signal.getsignal(one) == self._handle:
                # None stands for a handler set up outside Python, which Python can't bring back.
                signal.signal(one, signal.SIG_DFL if earlier is None else earlier)  # type: ignore[arg-type]

    def reset(self) -> None:
        """Forgets what was heard: the next signal is a new notice."""
        self._heard.clear()

    def poll(self) -> PreemptionNotice | None:
        """TERMINATE once a signal was heard; dated by the first of them."""
        try:
            name, heard_at = self._heard[0]
        except IndexError:
            return None
        deadline = None if self._grace_s is None else heard_at + timedelta(seconds=self._grace_s)
        return PreemptionNotice(NoticeKind.TERMINATE, self.name, f"{name} {heard_at.isoformat()}", deadline)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # A forked child inherits the handler but has no watcher: swallowed there, a SIGTERM would make
            # multiprocessing's Pool.terminate() wait for ever. The same path serves a handler that outlived `restore`.
            self._as_before(number, frame)
            return
        self._heard.append((signal.Signals(number).name, self._now()))
        earlier = self._earlier[number]
        if callable(earlier) and earlier is not signal.default_int_handler:
            earlier(number, frame)

    def _as_before(self, number: int, frame: FrameType | None) -> None:
        earlier = self._earlier[number]
        if callable(earlier):
            earlier(number, frame)
        elif earlier is not signal.SIG_IGN and signal.getsignal(number) == self._handle:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


class KeyboardSource:
    """Hears Ctrl-C, or a notebook's "interrupt", from `install` to `restore`: the first is a notice, and the next interrupts
    at once, as ever.

    A program that has a handler of its own for SIGINT, or ignores it, keeps it. So does one that trains outside the main
    thread, where Python can set none.

    Args:
        now: the wall clock; called inside a signal handler.
    """

    name = "keyboard"
    interval_s = 0.1

    def __init__(self, *, now: Callable[[], datetime] = lambda: datetime.now(timezone.utc)) -> None:
        self._now = now
        self._heard_at: datetime | None = None
        self._pid = 0

    def install(self) -> None:
        """Starts listening."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._pid = os.getpid()
            signal.signal(signal.SIGINT, self._handle)

    def restore(self) -> None:
        """Stops listening."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) == self._handle:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def poll(self) -> PreemptionNotice | None:
        """TERMINATE once it was heard. There is no deadline: a person waits."""
        if self._heard_at is None:
            return None
        return PreemptionNotice(NoticeKind.TERMINATE, self.name, f"SIGINT {self._heard_at.isoformat()}")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = self._now()
        if os.getpid() != self._pid or (self._heard_at is not None and (now - self._heard_at).total_seconds() > _SAME_KEY_S):
            signal.default_int_handler(number, frame)
        self._heard_at = self._heard_at or now


def _signal(name: str) -> signal.Signals:
    usable = {one.name: one for one in signal.Signals if one.name not in _UNUSABLE}
    wanted = name.strip().upper()
    if wanted not in usable:
        why = "can't be caught or survived" if wanted in _UNUSABLE else "is no signal of this system"
        raise ConfigError(f"signals: {name!r} {why}", hint=f"one or more of {', '.join(sorted(usable))}")
    return usable[wanted]
