"""The orders in which runs are listed, and their ages in words. Pure; commands need it for their help, so it imports little."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_spot.run.below import Summary

SORTS = ("name", "age", "step", "size", "state")


def sorted_runs(found: Sequence[Summary], by: str) -> list[Summary]:
    """Return runs in an order: one of `SORTS`."""
    long_ago = datetime.fromtimestamp(0, timezone.utc)
    keys: dict[str, Any] = {
        "name": lambda one: one.name,
        "age": lambda one: -(one.heard or long_ago).timestamp(),
        "step": lambda one: -one.step,
        "size": lambda one: -one.size_bytes,
        "state": lambda one: (one.in_words, one.name),
    }
    return sorted(found, key=keys[by])


def age_in_words(now: datetime, then: datetime) -> str:
    """Return how long ago something was, for people."""
    seconds = max(0.0, (now - then).total_seconds())
    for size_s, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size_s:
            return f"{seconds / size_s:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
