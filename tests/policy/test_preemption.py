from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_spot.notices.notice import NoticeKind
from hf_spot.policy.preemption import SAFETY, Action, Measured, decide, gives_way, leaves_step
from tests.policy.deadlines import simulate, total

seconds = st.floats(0.01, 1e5)
sizes = st.integers(0, 10**12)
measurements = st.builds(
    Measured,
    save_s=st.none() | seconds,
    size_bytes=st.none() | sizes,
    bytes_per_s=st.none() | st.floats(1e4, 1e11),
    commit_s=st.floats(0, 10),
    in_flight_bytes=st.none() | sizes,
    waiting_bytes=st.none() | sizes,
)
MB = 10**6


def measured(save_s: float, upload_s: int, in_flight_s: int | None = None, waiting_s: int | None = None) -> Measured:
    """In seconds of a link with one megabyte a second."""
    in_flight = None if in_flight_s is None else in_flight_s * MB
    return Measured(save_s, upload_s * MB, 1.0 * MB, 0.0, in_flight, None if waiting_s is None else waiting_s * MB)


def test_an_advisory_saves_and_goes_on() -> None:
    assert decide(NoticeKind.ADVISORY, None, Measured()).action is Action.SAVE_AND_GO_ON


def test_a_cancelled_notice_changes_nothing() -> None:
    assert decide(NoticeKind.CANCELLED, 5.0, measured(1, 1, 1)).action is Action.GO_ON


def test_a_notice_without_deadline_saves_and_stops() -> None:
    assert decide(NoticeKind.TERMINATE, None, measured(100, 100, 1)).action is Action.SAVE_AND_STOP


def test_an_upload_takes_its_bytes_over_the_throughput_and_what_every_commit_takes() -> None:
    assert Measured(bytes_per_s=2.0 * MB, commit_s=0.5).upload_s(10 * MB) == 5.5
    assert Measured(save_s=3.0, size_bytes=10 * MB, bytes_per_s=2.0 * MB, commit_s=0.5).new_s == 8.5


def test_a_save_that_can_not_fit_leaves_the_wire_to_the_upload_in_flight() -> None:
    assert decide(NoticeKind.TERMINATE, 10.0, measured(5, 60, in_flight_s=4)).action is Action.FINISH_UPLOAD_AND_STOP


def test_a_save_that_may_not_fit_is_tried_where_it_costs_the_upload_in_flight_nothing() -> None:
    assert decide(NoticeKind.TERMINATE, 30.0, measured(5, 60, in_flight_s=4)).action is Action.SAVE_AND_STOP


def test_the_first_save_of_a_run_is_tried_because_nothing_else_is_under_way() -> None:
    assert decide(NoticeKind.TERMINATE, 1.0, Measured()).action is Action.SAVE_AND_STOP


def test_while_the_first_upload_has_told_nothing_a_save_that_fits_by_itself_is_tried() -> None:
    first = Measured(save_s=20.0, size_bytes=MB, in_flight_bytes=MB)
    assert decide(NoticeKind.TERMINATE, 60.0, first).action is Action.SAVE_AND_STOP
    assert decide(NoticeKind.TERMINATE, 15.0, first).action is Action.FINISH_UPLOAD_AND_STOP


def test_a_newer_checkpoint_that_fits_only_alone_ends_the_upload_in_flight() -> None:
    assert gives_way(25.0, measured(5, 15, in_flight_s=14, waiting_s=15))


def test_a_newer_checkpoint_that_fits_behind_the_upload_in_flight_lets_it_finish() -> None:
    assert not gives_way(30.0, measured(5, 15, in_flight_s=14, waiting_s=15))


def test_where_neither_fits_the_smaller_one_goes_first() -> None:
    assert not gives_way(10.0, measured(5, 15, in_flight_s=8, waiting_s=15))
    assert gives_way(10.0, measured(5, 15, in_flight_s=15, waiting_s=8))


@given(seconds, measurements)
def test_a_termination_always_stops_and_more_time_never_makes_a_save_less_likely(left: float, known: Measured) -> None:
    sooner, later = (decide(NoticeKind.TERMINATE, s, known) for s in (left, 2 * left))
    assert sooner.action in (Action.SAVE_AND_STOP, Action.FINISH_UPLOAD_AND_STOP)
    if sooner.action is Action.SAVE_AND_STOP:
        assert later.action is Action.SAVE_AND_STOP


@given(seconds, measurements)
def test_with_nothing_in_flight_there_is_always_a_save(left: float, known: Measured) -> None:
    alone = replace(known, in_flight_bytes=None, waiting_bytes=None)
    assert decide(NoticeKind.TERMINATE, left, alone).action is Action.SAVE_AND_STOP


@given(seconds, measurements)
def test_a_save_is_skipped_only_where_it_can_not_surely_be_committed(left: float, known: Measured) -> None:
    if decide(NoticeKind.TERMINATE, left, known).action is Action.FINISH_UPLOAD_AND_STOP:
        assert known.save_s is not None
        assert SAFETY * (known.new_s or known.save_s) > left


@given(seconds, measurements)
def test_an_upload_that_can_be_committed_is_never_ended_for_one_that_can_not(left: float, known: Measured) -> None:
    in_flight_s, waiting_s = known.upload_s(known.in_flight_bytes), known.upload_s(known.waiting_bytes)
    if gives_way(left, known):
        assert in_flight_s is not None
        assert waiting_s is not None
        assert waiting_s <= left or in_flight_s > left
        assert in_flight_s + waiting_s > left
    if in_flight_s is None or waiting_s is None:
        assert not gives_way(left, known)


@given(measurements)
def test_without_a_deadline_nothing_gives_way(known: Measured) -> None:
    assert not gives_way(None, known)


@pytest.mark.parametrize("seed", [1, 2])
def test_of_the_notices_that_could_end_in_a_commit_almost_all_do_and_never_fewer_than_without_a_decision(seed: int) -> None:
    scores = simulate(60, seed)
    assert total(scores["hf_spot"]).possible > 4000
    assert total(scores["hf_spot"], lambda cell: cell.in_flight).possible > 150
    assert total(scores["hf_spot"]).rate_of_newest >= 0.97
    for cell, score in scores["hf_spot"].items():
        assert score.rate >= 0.97, cell
        assert score.did >= max(scores["always save"][cell].did, scores["never save"][cell].did), cell


def test_a_step_that_can_be_finished_in_time_is_finished() -> None:
    assert not leaves_step(120.0, 30.0, measured(5, 10))
    assert leaves_step(30.0, 30.0, measured(5, 10))


def test_without_measurements_half_of_the_time_is_kept_for_the_save() -> None:
    assert not leaves_step(30.0, 14.0, Measured())
    assert leaves_step(30.0, 16.0, Measured())


def test_without_a_deadline_a_long_step_is_left_and_a_short_one_finished() -> None:
    assert leaves_step(None, 60.0, Measured())
    assert not leaves_step(None, 1.0, measured(5, 10))


@given(seconds, seconds, measurements)
def test_more_time_never_makes_leaving_a_step_more_likely(left: float, rest_s: float, known: Measured) -> None:
    assert leaves_step(left, rest_s, known) or not leaves_step(2 * left, rest_s, known)
