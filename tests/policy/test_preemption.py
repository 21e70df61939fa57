from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hf_spot.notices.notice import NoticeKind
from hf_spot.policy.preemption import Action, Measured, decide, leaves_step

seconds = st.floats(0.01, 1e5)
maybe_seconds = st.none() | seconds


def test_an_advisory_saves_and_goes_on() -> None:
    assert decide(NoticeKind.ADVISORY, None, Measured()).action is Action.SAVE_AND_GO_ON


def test_a_cancelled_notice_changes_nothing() -> None:
    assert decide(NoticeKind.CANCELLED, 5.0, Measured(1, 1, 1)).action is Action.GO_ON


def test_a_notice_without_deadline_saves_and_stops() -> None:
    assert decide(NoticeKind.TERMINATE, None, Measured(100, 100, 1)).action is Action.SAVE_AND_STOP


def test_a_save_that_can_not_fit_leaves_the_wire_to_the_upload_in_flight() -> None:
    decision = decide(NoticeKind.TERMINATE, 10.0, Measured(save_s=5, upload_s=60, in_flight_s=4))
    assert decision.action is Action.FINISH_UPLOAD_AND_STOP


def test_a_save_that_fits_only_alone_cancels_the_upload_in_flight() -> None:
    decision = decide(NoticeKind.TERMINATE, 30.0, Measured(save_s=5, upload_s=15, in_flight_s=14))
    assert (decision.action, decision.cancel_in_flight) == (Action.SAVE_AND_STOP, True)


def test_a_save_that_fits_behind_the_upload_in_flight_lets_it_finish() -> None:
    decision = decide(NoticeKind.TERMINATE, 120.0, Measured(save_s=5, upload_s=15, in_flight_s=14))
    assert (decision.action, decision.cancel_in_flight) == (Action.SAVE_AND_STOP, False)


@given(seconds, maybe_seconds, maybe_seconds, maybe_seconds)
def test_a_termination_always_stops_and_more_time_never_makes_a_save_less_likely(
    left: float, save_s: float | None, upload_s: float | None, in_flight_s: float | None
) -> None:
    measured = Measured(save_s, upload_s, in_flight_s)
    sooner, later = (decide(NoticeKind.TERMINATE, s, measured) for s in (left, 2 * left))
    assert sooner.action in (Action.SAVE_AND_STOP, Action.FINISH_UPLOAD_AND_STOP)
    if sooner.action is Action.SAVE_AND_STOP:
        assert later.action is Action.SAVE_AND_STOP
    if in_flight_s is None:
        assert sooner.action is Action.SAVE_AND_STOP


def test_a_step_that_can_be_finished_in_time_is_finished() -> None:
    assert not leaves_step(120.0, 30.0, Measured(save_s=5, upload_s=10))
    assert leaves_step(30.0, 30.0, Measured(save_s=5, upload_s=10))


def test_without_measurements_half_of_the_time_is_kept_for_the_save() -> None:
    assert not leaves_step(30.0, 14.0, Measured())
    assert leaves_step(30.0, 16.0, Measured())


def test_without_a_deadline_a_long_step_is_left_and_a_short_one_finished() -> None:
    assert leaves_step(None, 60.0, Measured())
    assert not leaves_step(None, 1.0, Measured(save_s=5, upload_s=10))


@given(seconds, seconds, maybe_seconds, maybe_seconds)
def test_more_time_never_makes_leaving_a_step_more_likely(
    left: float, rest_s: float, save_s: float | None, upload_s: float | None
) -> None:
    measured = Measured(save_s, upload_s)
    assert leaves_step(left, rest_s, measured) or not leaves_step(2 * left, rest_s, measured)
