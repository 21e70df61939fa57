"""Wait for a store or a cloud service that does not answer when a command starts: its network may not be up yet.

What can't mend itself is an error at once: a bucket that does not exist, a setting, credentials that are missing or refused,
a program or login that should give credentials and does not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from hf_spot.errors import NoAnswer, SpotError, StoreUnavailable
from hf_spot.storage.credential_source import SourceFailed
from hf_spot.timeouts import FIRST_CONTACT_S

log = logging.getLogger("hf_spot")

_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 15.0

T = TypeVar("T")


def is_unavailable(error: BaseException) -> bool:
    """Return whether a store did not answer, or could not, although it could be asked."""
    return isinstance(error, StoreUnavailable) and not _is_of_credentials(error)


def _is_of_credentials(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, SourceFailed):
            return True
        error = error.__cause__
    return False


class FirstContact:
    """The tries of one request, or of several that belong together.

    Args:
        is_temporary: whether the same request may work later after this error.
        limit_s: how long to try.
        clock: seconds.
    """

    def __init__(
        self,
        is_temporary: Callable[[SpotError], bool] = is_unavailable,
        limit_s: float = FIRST_CONTACT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._is_temporary = is_temporary
        self._limit_s = limit_s
        self._clock = clock
        self._since_s: float | None = None  # of the first try that failed
        self._pause_s = _FIRST_PAUSE_S

    def pause_s(self, error: SpotError) -> float:
        """Return the seconds to wait before the next try.

        Args:
            error: of the try that has failed.

        Raises:
            NoAnswer: it has been tried for too long.
            SpotError: the error, if the same request would fail again.
        """
        if not self._is_temporary(error):
            raise error
        now = self._clock()
        if self._since_s is None:
            self._since_s = now
            log.warning("%s; trying again for up to %.0f minutes", error.args[0], self._limit_s / 60)
        if now - self._since_s >= self._limit_s:
            raise no_answer(error, now - self._since_s) from error
        pause, self._pause_s = self._pause_s, min(_LONGEST_PAUSE_S, 2 * self._pause_s)
        return pause


def patiently(ask: Callable[[], T], contact: FirstContact, sleep: Callable[[float], object] = time.sleep) -> T:
    """Ask until there is an answer, and return it. Raises as `FirstContact.pause_s`.

    Args:
        ask: sends the requests, from the beginning each time.
        contact: says how long to go on.
        sleep: waits for some seconds.
    """
    while True:
        try:
            return ask()
        except SpotError as error:
            sleep(contact.pause_s(error))


def no_answer(error: SpotError, waited_s: float) -> NoAnswer:
    """Return the error for a service that has not answered for so long."""
    return NoAnswer(f"no answer for {waited_s:.0f} s: {error.args[0]}", hint=error.hint or "start the same command again later")
