"""Which steps are passed over after NaN."""

from __future__ import annotations

import pytest

from hf_spot.policy.rollback import Span, in_words, span_of, spans_from, to_data


@pytest.mark.parametrize(
    ("first_wrong", "reached", "committed", "earlier", "expected"),
    [
        (8, 10, 5, [], Span(7, 8)),  # the update of step 7 may have caused the loss of step 8
        (None, 10, 5, [], Span(9, 10)),  # a weight is NaN, and no loss was
        (6, 10, 5, [], Span(6, 6)),  # step 5 is committed, and was finite
        (8, 10, 5, [Span(7, 8)], Span(6, 8)),
        (12, 15, 5, [Span(7, 8), Span(10, 12)], Span(8, 12)),
        (12, 15, 10, [Span(7, 8)], Span(11, 12)),  # that rollback helped: later steps are committed
        (3, 10, 5, [], Span(6, 6)),  # a loss of before the commit, which was finite
        (None, 10, 0, [Span(8, 10)] * 5, Span(1, 10)),
    ],
)
def test_the_steps_around_the_first_wrong_loss_are_passed_over(
    first_wrong: int | None, reached: int, committed: int, earlier: list[Span], expected: Span
) -> None:
    assert span_of(first_wrong, reached, committed, earlier) == expected


def test_spans_travel_as_json() -> None:
    spans = [Span(3, 3), Span(7, 9)]
    assert spans_from(to_data(spans)) == spans and in_words(spans) == "3, 7 to 9"
    assert [step for step in range(12) if any(step in span for span in spans)] == [3, 7, 8, 9]
    assert spans_from(None) == spans_from([None]) == spans_from([["x", 1]]) == []
