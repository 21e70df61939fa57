"""Tells the launcher what this rank is doing, and answers it with the stacks of all threads.

The stacks are written by a signal handler in C (`faulthandler`), which needs neither the GIL nor the main thread. Processes
that this one forks, such as DataLoader workers, inherit it.
"""

from __future__ import annotations

import faulthandler
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from hf_spot.policy.hangs import Phase
from hf_spot.runtime import STACKS_SIGNAL, PhaseTeller, Runtime
from hf_spot.training.upstream import COMPILATIONS

log = logging.getLogger("hf_spot")

_answering: dict[int, int] = {}  # by process: the descriptor that faulthandler writes to


class Phases:
    """The phases of one training on this rank, from construction until `close`. Without a launcher it does nothing.

    Args:
        runtime: of the launch, or None.
        rank: number of this process.
        training: number of the training in the run.
    """

    def __init__(self, runtime: Runtime | None = None, rank: int = 0, training: int = 1) -> None:
        self._teller: PhaseTeller | None = None
        self._compilations: Any = None
        self._before = Phase.STEP
        if runtime is None:
            return
        try:
            answer_with_stacks(runtime)
            self._teller = PhaseTeller(runtime.phase_path, rank, training)
        except OSError as error:
            log.warning("a hang of this process could not be detected: %s", error)

    def tell(self, phase: Phase, step: int | None = None) -> None:
        """Tell what comes next, or give a sign that the same goes on. Takes about a microsecond.

        Args:
            phase: that begins or goes on.
            step: the last finished step, if it has changed.
        """
        if self._teller is not None:
            self._teller.tell(phase, step)

    def enter(self, training: int) -> None:
        """Tell of another training from now on."""
        if self._teller is not None:
            self._teller.enter(training)

    def sign(self) -> None:
        """Give a sign that the phase goes on."""
        if self._teller is not None:
            self._teller.tell(self._teller.phase)

    @contextmanager
    def within(self, phase: Phase) -> Iterator[None]:
        """Tell a phase for the block, and the one before it again at its end."""
        before = Phase.OUTSIDE if self._teller is None else Phase(self._teller.phase)
        self.tell(phase)
        try:
            yield
        finally:
            self.tell(before)

    def watch_compilations(self) -> None:
        """Tell compilations by ``torch.compile`` from now on, once its compiler is imported: call it before each step."""
        if self._compilations is None and self._teller is not None:
            handler = COMPILATIONS.find()
            if handler is not None:
                self._compilations = handler
                handler.register_start_callback(self._compilation_begins)
                handler.register_end_callback(self._compilation_ends)

    def _compilation_begins(self, *_: Any) -> None:
        if self._teller is not None:
            self._before = Phase(self._teller.phase)
            self.tell(Phase.COMPILING)

    def _compilation_ends(self, *_: Any) -> None:
        self.tell(self._before)

    def close(self) -> None:
        """Tell that the training has ended."""
        if self._compilations is not None:
            with suppress(ValueError):  # the script has cleared torch's callbacks
                self._compilations.remove_start_callback(self._compilation_begins)
                self._compilations.remove_end_callback(self._compilation_ends)
            self._compilations = None
        self.tell(Phase.OUTSIDE)


def answer_with_stacks(runtime: Runtime) -> None:
    """Write the stacks of all threads to a file whenever `STACKS_SIGNAL` arrives. Repeated calls do nothing.

    Raises:
        OSError: the file can't be created.
    """
    process = os.getpid()
    if process in _answering:
        return
    file = os.open(runtime.stacks_path(process), os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
    faulthandler.register(STACKS_SIGNAL, file=file, all_threads=True)
    _answering[process] = file
