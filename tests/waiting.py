"""Waiting for what must happen, instead of for some seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

PATIENCE_S = 300.0
LONGEST_PAUSE_S = 0.1


def wait_for(condition: Callable[[], Any], what: str = "", longest_pause_s: float = LONGEST_PAUSE_S) -> Any:
    """Polls until the condition holds; its value.

    Args:
        condition: asked again and again, less often the longer it takes: who asks takes time from those who are waited for.
        what: is awaited, for the message.
        longest_pause_s: between two questions; short for what lasts but a moment.
    """
    began = time.monotonic()
    while not (value := condition()):
        waited_s = time.monotonic() - began
        assert waited_s < PATIENCE_S, f"waited in vain {what}"
        time.sleep(min(longest_pause_s, max(0.005, waited_s / 20)))
    return value
