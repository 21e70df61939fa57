from __future__ import annotations

import logging
import threading
import time
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_spot.notices.aws import IMDSSource
from hf_spot.notices.notice import NoticeKind, PreemptionNotice
from hf_spot.notices.watcher import Belief, Watcher
from hf_spot.testing import FakeIMDS
from tests.waiting import PATIENCE_S, wait_for

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)


def notice(kind: str, id: str = "1", in_s: float | None = None, source: str = "a") -> PreemptionNotice:
    deadline = None if in_s is None else NOW + timedelta(seconds=in_s)
    return PreemptionNotice(NoticeKind(kind), source, id, deadline)


class Scripted:
    """A source that answers what it is told to; an exception is raised."""

    def __init__(self, name: str = "a", interval_s: float = 0.01) -> None:
        self.name = name
        self.interval_s = interval_s
        self.answer: PreemptionNotice | Exception | None = None
        self.polled = 0

    def poll(self) -> PreemptionNotice | None:
        self.polled += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Desk:
    """A watcher over scripted sources ``a`` and ``b``, and everything that its listener heard."""

    def __init__(self) -> None:
        self.sources = {"a": Scripted("a"), "b": Scripted("b")}
        self.heard: list[PreemptionNotice] = []
        self.now = NOW
        self.trouble: Exception | None = None
        self.watcher = Watcher(self.sources.values(), self.listen, now=lambda: self.now)

    def listen(self, one: PreemptionNotice) -> None:
        if self.trouble is not None:
            raise self.trouble
        self.heard.append(one)

    def say(self, answer: PreemptionNotice | Exception | None, source: str = "a") -> list[PreemptionNotice]:
        """One source says something, the other repeats itself; returns what the listener heard of it."""
        before = len(self.heard)
        self.sources[source].answer = answer
        self.watcher.poll_once()
        return self.heard[before:]


@pytest.fixture
def desk() -> Desk:
    return Desk()


# -- what the listener is told -----------------------------------------------------------------------------------------


def test_a_notice_is_told_once_however_often_it_is_polled(desk: Desk) -> None:
    one = notice("TERMINATE", in_s=120)
    assert desk.say(one) == [one]
    assert desk.say(one) == desk.say(one) == []


def test_two_advisories_are_two_and_a_repetition_is_none(desk: Desk) -> None:
    first, second = notice("ADVISORY", "1"), notice("ADVISORY", "2")
    assert [desk.say(first), desk.say(first), desk.say(second), desk.say(first)] == [[first], [], [second], []]


def test_a_termination_follows_an_advisory(desk: Desk) -> None:
    advice, end = notice("ADVISORY"), notice("TERMINATE")
    assert desk.say(advice) == [advice]
    assert desk.say(end) == [end]


@pytest.mark.parametrize("source", ["a", "b"])
def test_an_advisory_after_a_termination_is_not_told(desk: Desk, source: str) -> None:
    desk.say(notice("TERMINATE"))
    assert desk.say(notice("ADVISORY", "2"), source) == []


def test_a_cancellation_after_a_termination_is_told(desk: Desk) -> None:
    desk.say(notice("TERMINATE"))
    gone = notice("CANCELLED", "2")
    assert desk.say(gone) == [gone]
    assert desk.say(gone) == desk.say(None) == []


def test_the_same_termination_after_its_cancellation_is_told_again(desk: Desk) -> None:
    end = notice("TERMINATE")
    desk.say(end)
    desk.say(notice("CANCELLED", "2"))
    assert desk.say(end) == [end]


def test_a_cancellation_of_nothing_is_not_told(desk: Desk) -> None:
    assert desk.say(notice("CANCELLED")) == []


def test_a_source_can_not_cancel_what_another_one_said(desk: Desk) -> None:
    desk.say(notice("TERMINATE"), "a")
    assert desk.say(notice("CANCELLED", "2"), "b") == []


def test_when_one_of_two_terminations_is_cancelled_the_other_is_told(desk: Desk) -> None:
    soon, later = notice("TERMINATE", "soon", in_s=30), notice("TERMINATE", "later", in_s=120, source="b")
    assert desk.say(soon, "a") == [soon]
    assert desk.say(later, "b") == []
    assert desk.say(notice("CANCELLED", "2"), "a") == [later]


def test_an_advice_that_a_termination_hid_is_told_after_the_cancellation(desk: Desk) -> None:
    advice, gone = notice("ADVISORY", source="b"), notice("CANCELLED", "2")
    desk.say(notice("TERMINATE"), "a")
    desk.say(advice, "b")
    assert desk.say(gone, "a") == [gone, advice]


def test_a_termination_without_deadline_does_not_replace_one_with_a_deadline(desk: Desk) -> None:
    # The cloud says when; the SIGTERM that follows at shutdown does not.
    desk.say(notice("TERMINATE", "imds", in_s=100), "a")
    assert desk.say(notice("TERMINATE", "signal", source="b"), "b") == []


def test_a_deadline_is_news_after_a_termination_without_one(desk: Desk) -> None:
    desk.say(notice("TERMINATE", "signal"), "a")
    dated = notice("TERMINATE", "imds", in_s=100, source="b")
    assert desk.say(dated, "b") == [dated]


def test_a_deadline_that_comes_closer_is_news_under_the_same_id(desk: Desk) -> None:
    desk.say(notice("TERMINATE", in_s=100))
    sooner = notice("TERMINATE", in_s=40)
    assert desk.say(sooner) == [sooner]


def test_a_deadline_that_moves_away_or_trembles_under_the_same_id_is_no_news(desk: Desk) -> None:
    desk.say(notice("TERMINATE", in_s=100))
    assert desk.say(notice("TERMINATE", in_s=200)) == []
    assert desk.say(notice("TERMINATE", in_s=99.5)) == []


def test_a_new_termination_of_the_same_source_is_told_even_if_it_is_later(desk: Desk) -> None:
    desk.say(notice("TERMINATE", "1", in_s=100))
    second = notice("TERMINATE", "2", in_s=200)
    assert desk.say(second) == [second]


said = st.builds(
    notice, st.sampled_from([kind.value for kind in NoticeKind]), st.sampled_from("xyz"), st.none() | st.floats(0, 300)
)


@given(st.lists(st.tuples(st.integers(0, 2), said), max_size=30))
def test_whatever_is_said_the_listener_believes_in_a_termination_exactly_while_one_stands(
    script: list[tuple[int, PreemptionNotice]],
) -> None:
    belief, standing, believed = Belief(), set(), None
    for source, one in script:
        belief.receive(source, one)
        for _ in range(10):
            news = belief.undelivered()
            if news is None:
                break
            belief.delivered(*news)
            if news[1].kind is NoticeKind.ADVISORY:
                assert believed is None
            else:
                believed = news[1] if news[1].kind is NoticeKind.TERMINATE else None
        assert belief.undelivered() is None, "delivery must come to an end"
        if one.kind is NoticeKind.TERMINATE:
            standing.add(source)
        elif one.kind is NoticeKind.CANCELLED:
            standing.discard(source)
        assert (believed is not None) == bool(standing)


# -- trouble -----------------------------------------------------------------------------------------------------------


def test_a_failing_source_is_logged_at_once_and_then_once_a_minute(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(5):
        desk.say(OSError("no route"))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "'a'" in caplog.text and "no route" in caplog.text
    desk.now += timedelta(seconds=59)
    desk.say(OSError("no route"))
    assert len(caplog.records) == 1
    desk.now += timedelta(seconds=1)
    desk.say(OSError("no route"))
    assert len(caplog.records) == 2


def test_other_trouble_of_the_same_source_is_logged_too(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    desk.say(OSError("no route"))
    desk.say(OSError("refused"))
    assert len(caplog.records) == 2


def test_a_failing_source_does_not_silence_the_other(desk: Desk) -> None:
    desk.say(OSError("no route"), "a")
    end = notice("TERMINATE", source="b")
    assert desk.say(end, "b") == [end]


def test_a_notice_that_the_listener_failed_to_take_is_told_again_until_it_does(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    end, gone = notice("TERMINATE"), notice("CANCELLED", "2")
    desk.trouble = OSError("disk full")
    assert desk.say(end) == desk.say(end) == []
    assert len(caplog.records) == 1 and "disk full" in caplog.text
    desk.trouble = None
    assert desk.say(end) == [end]
    desk.trouble = OSError("disk full")
    desk.say(gone)
    desk.trouble = None
    assert desk.say(None) == [gone]


def test_trouble_can_be_sent_to_a_log_of_ones_own(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    source = Scripted()
    source.answer = OSError("no route")
    Watcher([source], desk.listen, log=logging.getLogger("of my own")).poll_once()
    assert [record.name for record in caplog.records] == ["of my own"]


# -- threads -----------------------------------------------------------------------------------------------------------


def test_the_threads_hear_a_real_service_through_its_failures() -> None:
    heard: list[PreemptionNotice] = []
    with FakeIMDS() as imds:
        source = IMDSSource(imds.endpoint, interval_s=0.01)
        imds.fail(500, times=5)
        with Watcher([source], heard.append, log=logging.getLogger("quiet")):
            wait_for(lambda: len(imds.requests) > 6)
            imds.rebalance()
            wait_for(lambda: len(heard) == 1)
            imds.interrupt()
            wait_for(lambda: len(heard) == 2)
            imds.cancel()
            wait_for(lambda: len(heard) == 3)
    assert [one.kind.value for one in heard] == ["ADVISORY", "TERMINATE", "CANCELLED"]


def test_a_watch_survives_a_failing_source_and_a_failing_listener(caplog: pytest.LogCaptureFixture) -> None:
    source, heard = Scripted(), []
    source.answer = ValueError("bad minute")

    def listen(one: PreemptionNotice) -> None:
        heard.append(one)
        if len(heard) < 3:
            raise RuntimeError("not now")

    with Watcher([source], listen):
        wait_for(lambda: source.polled > 2)
        source.answer = notice("TERMINATE")
        wait_for(lambda: len(heard) == 3)
        polled = source.polled
        wait_for(lambda: source.polled > polled + 1)
    assert len(heard) == 3
    assert len(caplog.records) == 2


def test_every_source_is_polled_at_the_start_without_waiting_for_its_interval() -> None:
    source, heard = Scripted(interval_s=3600), threading.Event()
    source.answer = notice("TERMINATE")
    with Watcher([source], lambda one: heard.set()):
        assert heard.wait(PATIENCE_S)


def test_stop_waits_neither_for_an_interval_nor_for_a_poll_that_hangs() -> None:
    release, polling = threading.Event(), threading.Event()

    class Hanging(Scripted):
        def poll(self) -> PreemptionNotice | None:
            polling.set()
            release.wait(PATIENCE_S)
            return notice("TERMINATE")

    heard: list[PreemptionNotice] = []
    watcher = Watcher([Scripted(interval_s=3600), Hanging()], heard.append)
    watcher.start()
    assert polling.wait(PATIENCE_S)
    began = time.monotonic()
    watcher.stop()
    assert time.monotonic() - began < PATIENCE_S / 10
    release.set()
    wait_for(lambda: not any(thread.is_alive() for thread in watcher._threads))
    assert heard == [], "no call of the listener may begin after stop"


def test_the_listener_may_stop_the_watch() -> None:
    source, stopped = Scripted(), threading.Event()
    source.answer = notice("TERMINATE")

    def listen(one: PreemptionNotice) -> None:
        watcher.stop()
        stopped.set()

    watcher = Watcher([source], listen)
    watcher.start()
    assert stopped.wait(PATIENCE_S)
    wait_for(lambda: not any(thread.is_alive() for thread in watcher._threads))


def test_the_listener_is_called_by_one_thread_at_a_time() -> None:
    inside, most, calls = 0, 0, 0

    def listen(one: PreemptionNotice) -> None:
        nonlocal inside, most, calls
        inside += 1
        most = max(most, inside)
        time.sleep(0.002)
        inside -= 1
        calls += 1

    class Chatty(Scripted):
        def poll(self) -> PreemptionNotice | None:
            self.polled += 1
            return notice("ADVISORY", f"{self.name} {self.polled}")

    with Watcher([Chatty(str(number), 0.0001) for number in range(4)], listen):
        wait_for(lambda: calls > 20)
    assert most == 1


def test_threads_do_not_keep_the_process_alive() -> None:
    watcher = Watcher([Scripted()], lambda one: None)
    with watcher:
        assert all(thread.daemon for thread in watcher._threads)


def test_a_watcher_starts_once() -> None:
    watcher = Watcher([], lambda one: None)
    watcher.start()
    watcher.stop()
    watcher.stop()
    with pytest.raises(RuntimeError):
        watcher.start()
