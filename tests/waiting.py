"""Waiting for what must happen, instead of for some seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

PATIENCE_S = 120.0


def wait_for(condition: Callable[[], Any], what: str = "") -> Any:
    """Polls until the condition holds; its value."""
    give_up_at = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < give_up_at, f"waited in vain {what}"
        time.sleep(0.005)
    return value
