"""Wait for objects that must exist but are not found at once: a proxy answers 404, or a store lags behind its own writes."""

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
    """Read an object that must exist. While it is not found, try again after each of ``waits_s`` seconds.

    Args:
        read: raises ObjectNotFound if the object is missing.
        waits_s: empty to try once.
        look: called after each wait; an exception that it raises ends the wait.

    Raises:
        ObjectNotFound: the object is missing after the last wait, too.
    """
    for wait_s in waits_s:
        try:
            return read()
        except ObjectNotFound:
            time.sleep(wait_s)
            look()
    return read()
