"""Wait for the training of a process that a command has left behind, such as a daemon or a job in the background."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import psutil

from hf_spot.errors import EXIT_FINISHED
from hf_spot.policy.restarts import waits_for_the_rest
from hf_spot.runtime import Runtime

log = logging.getLogger("hf_spot")

EXIT_FAILED = 1


class LeftBehind:
    """Decides how long the launcher waits for what is left of a command that has ended with 0.

    Args:
        runtime: of the launch.
        clock: seconds, monotonic.
    """

    def __init__(self, runtime: Runtime, clock: Callable[[], float]) -> None:
        self._runtime = runtime
        self._clock = clock
        self._since_s: float | None = None
        self._is_told = False

    def code(self, training: bool | None, processes: Callable[[], Sequence[psutil.Process]]) -> int | None:
        """Return the exit code of the command if nothing is left to wait for; None otherwise, or if it has not ended.

        Args:
            training: whether a training is running; None if none has begun in this launch.
            processes: returns those of the launch, parents before their children.
        """
        if not self._runtime.has_command_ended:
            return None
        if self._since_s is None:
            self._since_s = self._clock()
        living = processes()[1:]  # without the guard
        pythons = [one for one in living if _is_python(one)]
        if waits_for_the_rest(self._clock() - self._since_s, training=training, may_train=bool(pythons)):
            if training and not self._is_told:
                self._is_told = True
                log.info("the command has ended, and has left a training behind: waiting for it")
            return None
        if training is None and pythons:
            log.warning(
                "the command has ended with 0, and has left process %d behind, which has not begun to train: it is ended",
                pythons[0].pid,
            )
        return EXIT_FAILED if self._runtime.has_failed_since_the_command() else EXIT_FINISHED

    def seen_late(self, code: int) -> int:
        """Return the exit code of a command that has ended together with all that it has left behind.

        Args:
            code: its own exit code.
        """
        return EXIT_FAILED if code == EXIT_FINISHED and self._runtime.has_failed_since_the_command() else code


def _is_python(process: psutil.Process) -> bool:
    try:
        return "python" in process.name()
    except psutil.Error:  # it has ended
        return False
