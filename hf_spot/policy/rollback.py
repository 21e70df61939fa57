"""Which steps a training passes over after it has met NaN. Pure.

A rollback resumes the newest checkpoint and passes over the steps around the first loss that was not finite: their batches are
drawn and dropped, so the data order, the schedule and the numbers of the steps stay those of the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

KIND = "rollback"


@dataclass(frozen=True, order=True)
class Span:
    """Steps to pass over, both ends included."""

    first: int
    last: int

    def __contains__(self, step: int) -> bool:
        return self.first <= step <= self.last


def span_of(first_wrong: int | None, reached: int, committed: int, earlier: Sequence[Span]) -> Span:
    """Return the steps to pass over.

    The update before the first wrong loss may have caused it, so it is passed over, too. If that was not enough, and the
    training met NaN near a span again, the next one begins earlier: twice as early each time.

    Args:
        first_wrong: the first step whose loss was not finite; None if all that are known were.
        reached: the step at which a number that is not finite was found.
        committed: the step of the newest checkpoint.
        earlier: spans of earlier rollbacks.
    """
    wrong = reached if first_wrong is None else first_wrong
    again = sum(one.last >= committed for one in earlier)
    last = min(wrong, reached)
    return Span(max(committed + 1, last - 2**again), max(last, committed + 1))


def spans_from(told: Any) -> list[Span]:
    """Return the spans that `to_data` wrote; none for other values."""
    try:
        return [Span(int(first), int(last)) for first, last in told or ()]
    except (TypeError, ValueError):
        return []


def to_data(spans: Iterable[Span]) -> list[list[int]]:
    """Return spans as JSON values."""
    return [[one.first, one.last] for one in spans]


def in_words(spans: Sequence[Span]) -> str:
    """Return spans for people."""
    return ", ".join(f"{one.first}" if one.first == one.last else f"{one.first} to {one.last}" for one in spans)
