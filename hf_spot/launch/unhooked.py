"""Name Pythons of a launch that may train and don't carry hf_spot's hook."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from hf_spot.runtime import Runtime

log = logging.getLogger("hf_spot")

_EVERY_S = 10.0
_LIBRARY = b"libtorch_cpu"
_SHOWN = 100  # characters


class Unhooked:
    """Warns about each process that has loaded torch without having met hf_spot.

    Such a process was started with ``python -I`` or ``-E``, or without the environment variables of the launch, and nothing in
    it can be saved. Processes that others have forked are theirs.

    Args:
        runtime: of the launch.
        clock: seconds, monotonic.
    """

    def __init__(self, runtime: Runtime, clock: Callable[[], float]) -> None:
        self._runtime = runtime
        self._clock = clock
        self._next_at = clock() + _EVERY_S
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
        for one in processes():
            if one in self._seen:
                continue
            try:
                has_torch, words = _has_torch(one), tuple(one.cmdline())
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
