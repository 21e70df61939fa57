"""Ctrl-C as a notice, with real signals."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone

import pytest

from hf_spot.notices.notice import NoticeKind
from hf_spot.notices.signals import KeyboardSource

BEGAN = datetime(2026, 1, 1, tzinfo=timezone.utc)


@pytest.fixture(autouse=True)
def usual_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_is_a_notice_and_the_next_interrupts() -> None:
    clock = [BEGAN]
    source = KeyboardSource(now=lambda: clock[0])
    source.install()
    assert source.poll() is None
    signal.raise_signal(signal.SIGINT)
    notice = source.poll()
    assert notice is not None and notice.kind is NoticeKind.TERMINATE and notice.deadline is None
    clock[0] += timedelta(seconds=0.5)
    signal.raise_signal(signal.SIGINT)  # of the same press, passed on by a launcher
    assert source.poll() == notice
    clock[0] += timedelta(seconds=1)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    source.restore()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("own", [signal.SIG_IGN, lambda number, frame: None], ids=["ignored", "handled"])
def test_a_program_with_a_way_of_its_own_keeps_it(own: object) -> None:
    signal.signal(signal.SIGINT, own)  # type: ignore[arg-type]
    source = KeyboardSource()
    source.install()
    assert signal.getsignal(signal.SIGINT) is own
    source.restore()
    assert signal.getsignal(signal.SIGINT) is own


def test_outside_the_main_thread_it_hears_nothing_and_breaks_nothing() -> None:
    source = KeyboardSource()
    thread = threading.Thread(target=lambda: (source.install(), source.restore()))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert source.poll() is None


def test_a_forked_child_is_interrupted_as_ever() -> None:
    source = KeyboardSource()
    source.install()
    child = os.fork()
    if child == 0:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            os._exit(42)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    source.restore()
