"""Objects that must be there and are not found at once: a proxy answers 404, or a store lags behind its own writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from hf_spot.errors import ObjectNotFound

WAITS_S = (0.2, 0.5, 1.0)

T = TypeVar("T")


def again_if_missing(
    read: Callable[[], T], *, waits_s: Sequence[float] = WAITS_S, look: Callable[[], None] = lambda: None
) -> T:
    """Read an object that must be there, again after each of ``waits_s`` seconds while it is not found.

    Args:
        read: raises ObjectNotFound where it is not.
        waits_s: empty to ask once.
        look: called after each wait; what it raises ends the wait.

    Raises:
        ObjectNotFound: it is not there in the end either.
    """
    for wait_s in waits_s:
        try:
            return read()
        except ObjectNotFound:
            time.sleep(wait_s)
            look()
    return read()
