"""Signals as notices: how Kubernetes, Slurm, SageMaker and people end a process."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from types import FrameType

from hf_spot.arguments import SpotArguments
from hf_spot.errors import ConfigError
from hf_spot.notices.notice import NoticeKind, PreemptionNotice

log = logging.getLogger("hf_spot")

_UNUSABLE = {
    **dict.fromkeys(("SIGKILL", "SIGSTOP"), "can't be caught"),
    # The faulting instruction runs again, so a handler that returns hangs.
    **dict.fromkeys(("SIGSEGV", "SIGFPE", "SIGILL", "SIGBUS"), "can't be caught or survived"),
    "SIGCHLD": "is sent whenever a process ends that was started here",
}

# Whatever --signals and --notice say: they end a process that does not listen to them, and all that it has not saved is lost.
_ALWAYS = ("SIGTERM", "SIGINT", "SIGHUP")

# A terminal sends SIGINT to every process, and a launcher such as torchrun forwards its own: one Ctrl-C arrives twice.
_SAME_KEY_S = 1.0


def answered_signals(arguments: SpotArguments) -> tuple[signal.Signals, ...]:
    """Return the signals that a launch treats as a notice, and that must not kill any of its processes.

    These are the signals in ``arguments.signals``, if the source 'signal' is active, and always SIGTERM, SIGINT and SIGHUP.

    Raises:
        ConfigError: a name is not a usable signal.
    """
    sources = {name.strip() for name in arguments.notice.split(",")}
    named = arguments.signals.split(",") if sources & {"auto", "signal"} else []
    return tuple(dict.fromkeys(map(_signal, [*named, *_ALWAYS])))


def is_left_alone(one: signal.Signals) -> bool:
    """Tell whether this process was started so that it outlives the end of its terminal, as ``nohup`` does."""
    return one is signal.SIGHUP and signal.getsignal(one) is signal.SIG_IGN


def is_caught_by(process: int, one: signal.Signals) -> bool:
    """Tell whether a process has a handler for a signal. Without /proc that is unknown, and True."""
    try:
        with open(f"/proc/{process}/status") as file:
            caught = next(line for line in file if line.startswith("SigCgt:"))
    except (OSError, StopIteration):
        return not os.path.exists("/proc/self/status")
    return bool(int(caught.split()[1], 16) >> (one - 1) & 1)


@contextmanager
def held_back(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Let signals to this thread wait until the end of the block.

    A process that is started within it inherits that, with its first instruction and over an exec, until it says otherwise.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class SignalSource:
    """Receives signals sent to this process, from `install` to `restore`.

    The first signal is the notice; further ones, of any name, repeat it and increase `count`. A handler that the program
    installed before is also called. SIGHUP stays ignored in a program that was started with ``nohup``.

    Args:
        signals: names of the signals.
        grace_s: seconds from the signal to the kill, if known; the notice's deadline follows from it.
        now: the wall clock; called inside a signal handler.

    Raises:
        ConfigError: a name is not a usable signal, or ``grace_s`` is not positive.
    """

    name = "signal"
    interval_s = 0.1

    def __init__(
        self,
        signals: Iterable[str] = ("SIGTERM", "SIGUSR1", "SIGHUP"),
        grace_s: float | None = None,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
    ) -> None:
        self._signals = [_signal(name) for name in signals]
        if not self._signals:
            raise ConfigError("signals='' names no signal for the source 'signal'", hint="--signals SIGTERM,SIGUSR1,SIGHUP")
        if grace_s is not None and not grace_s > 0:
            raise ConfigError(f"grace_s={grace_s} must be positive", hint="omit it if it is unknown")
        self.where = ",".join(one.name for one in self._signals)
        self._grace_s = grace_s
        self._now = now
        # Appending to a deque is atomic and takes no lock: a handler may interrupt anything, another handler included.
        self._received: deque[tuple[str, datetime]] = deque()
        self._earlier: dict[signal.Signals, object] = {}
        self._displaced: set[signal.Signals] = set()
        self._pid = 0

    @property
    def count(self) -> int:
        """Return the number of signals received since the start, or since `reset`."""
        return len(self._received)

    def count_of(self, name: str) -> int:
        """Return how many of them were the signal ``name``."""
        return sum(received == name for received, _ in self._received.copy())

    def install(self) -> None:
        """Install the handlers. Outside the main thread Python can't: then log a warning and do nothing else."""
        if threading.current_thread() is not threading.main_thread():
            log.warning("signals (%s) can't be received: training does not run in the main thread", self.where)
            return
        if self._pid:
            return
        self._pid = os.getpid()
        for one in self._signals:
            if not is_left_alone(one):
                self._earlier[one] = signal.getsignal(one)
                signal.signal(one, self._handle)

    def restore(self) -> None:
        """Restore the earlier handlers, unless another one has been installed over ours since."""
        if not self._pid or threading.current_thread() is not threading.main_thread():
            return
        self._pid = 0
        for one, earlier in self._earlier.items():
            if signal.getsignal(one) == self._handle:
                # None stands for a handler installed outside Python, which Python can't restore.
                signal.signal(one, signal.SIG_DFL if earlier is None else earlier)  # type: ignore[arg-type]

    def reset(self) -> None:
        """Forget the received signals: the next one is a new notice."""
        self._received.clear()

    def poll(self) -> PreemptionNotice | None:
        """Return TERMINATE after a signal was received; the first one sets its time."""
        self._name_displaced()
        try:
            name, received_at = self._received[0]
        except IndexError:
            return None
        deadline = None if self._grace_s is None else received_at + timedelta(seconds=self._grace_s)
        return PreemptionNotice(NoticeKind.TERMINATE, self.name, f"{name} {received_at.isoformat()}", deadline)

    def _name_displaced(self) -> None:
        """Log once per signal that the program has installed a handler over this one."""
        if self._pid != os.getpid():
            return
        for one in self._earlier:
            if one not in self._displaced and signal.getsignal(one) != self._handle and self._pid:
                self._displaced.add(one)
                log.warning(
                    "the program has installed its own handler for %s while it trains: unless that calls the one before it, "
                    "%s is no notice any more. Install it before train()",
                    one.name,
                    one.name,
                )

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # A forked child inherits the handler but has no watcher: if it swallowed a SIGTERM, multiprocessing's
            # Pool.terminate() would wait forever. The same path serves a handler that outlived `restore`.
            self._as_before(number, frame)
            return
        self._received.append((signal.Signals(number).name, self._now()))
        earlier = self._earlier[signal.Signals(number)]
        if callable(earlier) and earlier is not signal.default_int_handler:
            earlier(number, frame)

    def _as_before(self, number: int, frame: FrameType | None) -> None:
        earlier = self._earlier[signal.Signals(number)]
        if callable(earlier):
            earlier(number, frame)
        elif earlier is not signal.SIG_IGN and signal.getsignal(number) == self._handle:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


class KeyboardSource:
    """Receives Ctrl-C, or a notebook's stop button, from `install` to `restore`: the first press is a notice, the next one
    interrupts at once, as usual.

    A program that has its own handler for SIGINT, or ignores it, keeps that. So does one that trains outside the main
    thread, where Python can't install handlers.

    Args:
        now: the wall clock; called inside a signal handler.
    """

    name = "keyboard"
    interval_s = 0.1

    def __init__(self, *, now: Callable[[], datetime] = lambda: datetime.now(timezone.utc)) -> None:
        self._now = now
        self._first_at: datetime | None = None
        self._pid = 0

    def install(self) -> None:
        """Install the handler."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._pid = os.getpid()
            signal.signal(signal.SIGINT, self._handle)

    def restore(self) -> None:
        """Restore the default handler."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) == self._handle:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def poll(self) -> PreemptionNotice | None:
        """Return TERMINATE after the first press. There is no deadline: a person is waiting."""
        if self._first_at is None:
            return None
        return PreemptionNotice(NoticeKind.TERMINATE, self.name, f"SIGINT {self._first_at.isoformat()}")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = self._now()
        if os.getpid() != self._pid or (self._first_at is not None and (now - self._first_at).total_seconds() > _SAME_KEY_S):
            signal.default_int_handler(number, frame)
        self._first_at = self._first_at or now


def _signal(name: str) -> signal.Signals:
    usable = {one.name: one for one in signal.Signals if one.name not in _UNUSABLE}
    wanted = name.strip().upper()
    if wanted not in usable:
        why = _UNUSABLE.get(wanted, "is not a signal of this system")
        raise ConfigError(f"signals: {name!r} {why}", hint=f"one or more of {', '.join(sorted(usable))}")
    return usable[wanted]
