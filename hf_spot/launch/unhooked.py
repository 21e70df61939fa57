"""Name Pythons of a launch that may train and don't carry hf_spot's hook, and a command that starts none that does."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from hf_spot.runtime import Runtime

log = logging.getLogger("hf_spot")

_EVERY_S = 10.0
_FIRST_S = 50.0  # of a command that has not begun to train
_LIBRARY = b"libtorch_cpu"
_SHOWN = 100  # characters


class Unhooked:
    """Warns about each process that has loaded torch without having met hf_spot, or may have, as another user's.

    Such a process was started with ``python -I`` or ``-E``, or without the environment variables of the launch, and nothing in
    it can be saved. Processes that others have forked are theirs. It also warns, once, if no process has met hf_spot within a
    minute: the training may run where no process of this launch is.

    Args:
        runtime: of the launch.
        clock: seconds, monotonic.
    """

    def __init__(self, runtime: Runtime, clock: Callable[[], float]) -> None:
        self._runtime = runtime
        self._clock = clock
        self._next_at = clock() + _EVERY_S
        self._expected_at: float | None = clock() + _FIRST_S
        self._seen: set[psutil.Process] = set()
        self._met: set[tuple[str, ...]] = set()  # command lines

    def look(self, processes: Callable[[], Sequence[psutil.Process]]) -> None:
        """Look at the processes, if it is time.

        Args:
            processes: returns those of the launch, parents before their children.
        """
        if self._clock() < self._next_at:
            return
        self._next_at = self._clock() + _EVERY_S
        if self._expected_at is not None and self._clock() >= self._expected_at:
            self._expected_at = None
            if not self._runtime.has_met_any():
                log.warning(
                    "no process of this command has loaded torch with hf_spot yet: a training that it starts on another "
                    "machine, in a container, or as a service is not protected"
                )
        for one in processes():
            if one in self._seen:
                continue
            try:
                words = tuple(one.cmdline())
                has_torch = _has_torch(one)
            except PermissionError:
                self._seen.add(one)
                if words and "python" in words[0].rpartition("/")[2] and words not in self._met:
                    self._met.add(words)
                    log.warning(
                        "process %d runs as another user, so a training in it is not protected (%s); start hf-spot launch as "
                        "that user instead",
                        one.pid,
                        _shortened(shlex.join(words)),
                    )
                continue
            except (psutil.Error, OSError):  # it has ended
                continue
            if not has_torch:
                continue
            self._seen.add(one)
            if self._runtime.has_met(one.pid):
                self._met.add(words)
            elif words not in self._met:
                self._met.add(words)
                log.warning(
                    "process %d has loaded torch without hf_spot, so a training in it is not protected: its PYTHONPATH lacks "
                    "the launch's folder, or it was started with -I, -E or -S (%s)",
                    one.pid,
                    _shortened(shlex.join(words)),
                )


def _has_torch(process: psutil.Process) -> bool:
    return _LIBRARY in Path(f"/proc/{process.pid}/maps").read_bytes()


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
