"""Journals made in memory, for tests of what is computed from them."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterable
from datetime import datetime, timedelta, timezone
from typing import Any

from hf_spot.run.journal import Entry, Journal
from hf_spot.storage.memory import MemoryStore

BEGAN = datetime(2026, 1, 1, tzinfo=timezone.utc)
Event = tuple[str, dict[str, Any]]


def journal_of(*events: Event) -> list[Entry]:
    """A journal with ten seconds between its entries."""
    return timed(zip(itertools.count(0, 10), events, strict=False))


def timed(events: Iterable[tuple[float, Event]]) -> list[Entry]:
    """A journal with each entry at its second."""
    clock = [BEGAN]
    journal = Journal(MemoryStore(f"memory://{uuid.uuid4().hex}"), now=lambda: clock[0])
    for at_s, (kind, data) in events:
        clock[0] = BEGAN + timedelta(seconds=at_s)
        if kind == "claim":
            journal.claim(data)
        else:
            journal.append(kind, data)
    return list(journal.entries())


def claim(name: str = "a", **machine: Any) -> Event:
    """A launch on the machine ``name``."""
    return "claim", {"hostname": name, "pid": 1, "machine": {"instance_id": f"i-{name}", **machine}}


def commit(step: int, reason: str = "schedule", timing: dict[str, Any] | None = None, **more: Any) -> Event:
    """A checkpoint without files."""
    fields = {"step": step, "reason": reason, "stage": 1, "complete": False, "prefix": f"x/checkpoint-{step}", "files": []}
    return "commit", {**fields, **({"timing": timing} if timing else {}), **more}


def timing(
    step: int, steps: int, steps_s: float, *, stalled_s: float = 0.0, first_step_s: float = 0.0, restore_s: float = 0.0
) -> dict[str, Any]:
    """What a training has measured when it has reached ``step``."""
    return {
        "restore_s": restore_s,
        "first_step_s": first_step_s,
        "steps_s": steps_s,
        "stalled_s": stalled_s,
        "steps": steps,
        "step": step,
    }
