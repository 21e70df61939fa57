"""Handle signals to a launcher from its start to its end.

Before the run is claimed nothing can be lost, and a signal ends the launch as a preemption. After that `hf_spot.notices`
handles them. When it stops, the outcome of the launch is decided, and signals no longer change it. The first process of a
container does not receive signals for which it has no handler, so this module imports nothing that takes time.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

EXIT_PREEMPTED = 75  # as in `hf_spot.errors`
_BY_DEFAULT = ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT")
_PREEMPTED_EARLY = b"hf-spot: preempted before anything began; start the same command again to resume\n"

_is_over = False


def option(argv: Sequence[str], name: str) -> str | None:
    """Return the value of an option of hf-spot, as far as it can be determined before the command line is parsed.

    Args:
        argv: the arguments after ``hf-spot launch``.
        name: of the option, with its hyphens.
    """
    for number, word in enumerate(argv):
        if word in ("-m", "--module") or word.endswith(".py"):  # the rest may be the script's own arguments
            break
        if word == name:
            return next(iter(argv[number + 1 :]), None)
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def has_flag(argv: Sequence[str], name: str) -> bool:
    """Return whether a flag of hf-spot is given, as far as that can be determined before the command line is parsed.

    Args:
        argv: the arguments after ``hf-spot launch``.
        name: of the flag, with its hyphens.
    """
    return option([*argv, ""], name) is not None


def likely_signals(argv: Sequence[str]) -> list[signal.Signals]:
    """Return the signals that will mean preemption, as far as the command line shows it. Invalid names are left out."""
    names = [
        *_BY_DEFAULT,
        *(name.strip().upper() for name in (option(argv, "--signals") or os.environ.get("HF_SPOT_SIGNALS", "")).split(",")),
    ]
    usable = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}
    return [signal.Signals[name] for name in dict.fromkeys(names) if signal.Signals.__members__.get(name) in usable]


def listen(argv: Sequence[str]) -> list[signal.Signals]:
    """End the process with 75 at the first signal, until `stand_down`. Signals that already have a handler keep it.

    Args:
        argv: the arguments after ``hf-spot launch``.

    Returns:
        The signals that are handled from now on.
    """
    global _is_over
    _is_over = False
    if threading.current_thread() is not threading.main_thread():
        return []
    free = [one for one in likely_signals(argv) if signal.getsignal(one) in (signal.SIG_DFL, signal.default_int_handler)]
    for one in free:
        signal.signal(one, _leave)
    return free


@contextmanager
def listening(argv: Sequence[str]) -> Iterator[None]:
    """Handle signals as `listen` does, and restore the default handlers at the end of the block."""
    free = listen(argv)
    try:
        yield
    finally:
        for one in free:
            signal.signal(one, signal.default_int_handler if one == signal.SIGINT else signal.SIG_DFL)


def stand_down() -> None:
    """Ignore signals from now on: another handler takes over, and when it has stopped, signals no longer matter."""
    global _is_over
    _is_over = True


def ignore() -> None:
    """Ignore signals while Python ends: it removes all handlers first, and a signal would change the exit code."""
    for one in signal.valid_signals():
        if signal.getsignal(one) is _leave:
            signal.signal(one, signal.SIG_IGN)


def _leave(number: int, frame: FrameType | None) -> None:
    global _is_over
    if _is_over:
        return
    _is_over = True  # a second signal must not interrupt the cleanup
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    os.write(2, _PREEMPTED_EARLY)
    raise SystemExit(EXIT_PREEMPTED)
