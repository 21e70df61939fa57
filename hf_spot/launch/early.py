"""Signals to a launcher from its first moment to its last.

Before the run is claimed nothing can be lost, and a signal ends the launch as a preemption. Then `hf_spot.notices` listens.
When that has ended, how the launch ended is decided, and no signal changes it any more. A process that is the first of its
container is sent no signal that it has no handler for: this imports nothing that takes time.
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
_TOLD = b"hf-spot: preempted before anything began; start the same command again to go on\n"

_is_over = False


def option(argv: Sequence[str], name: str) -> str | None:
    """Return what stands behind an option of hf-spot on the command line, as far as it can be told before it is parsed.

    Args:
        argv: what stands behind ``hf-spot launch``.
        name: of the option, with its hyphens.
    """
    for number, word in enumerate(argv):
        if word in ("-m", "--module") or word.endswith(".py"):  # what follows may be the script's own
            break
        if word == name:
            return next(iter(argv[number + 1 :]), None)
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def likely_signals(argv: Sequence[str]) -> list[signal.Signals]:
    """Return the signals that will mean preemption, as far as the command line shows it; names that are none are left out."""
    names = [*_BY_DEFAULT, *(name.strip().upper() for name in (option(argv, "--signals") or "").split(","))]
    usable = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}
    return [signal.Signals[name] for name in dict.fromkeys(names) if signal.Signals.__members__.get(name) in usable]


def listen(argv: Sequence[str]) -> list[signal.Signals]:
    """End the process with 75 at the first signal, until `stand_down`. A signal that somebody handles already stays theirs.

    Args:
        argv: what stands behind ``hf-spot launch``.

    Returns:
        The signals that are listened to from now on.
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
    """As `listen`, until the end of the block: for those who have more to do then."""
    free = listen(argv)
    try:
        yield
    finally:
        for one in free:
            signal.signal(one, signal.default_int_handler if one == signal.SIGINT else signal.SIG_DFL)


def stand_down() -> None:
    """From now on somebody else listens; what comes when they have stopped is let go."""
    global _is_over
    _is_over = True


def ignore() -> None:
    """Let go what comes while Python ends: it takes back all handlers first, and a signal would change the exit code."""
    for one in signal.valid_signals():
        if signal.getsignal(one) is _leave:
            signal.signal(one, signal.SIG_IGN)


def _leave(number: int, frame: FrameType | None) -> None:
    global _is_over
    if _is_over:
        return
    _is_over = True  # nothing more is to be said, and what is cleaned up now shall be
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    os.write(2, _TOLD)
    raise SystemExit(EXIT_PREEMPTED)
