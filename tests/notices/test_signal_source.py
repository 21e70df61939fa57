"""Real signals to real processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from hf_spot.errors import ConfigError
from hf_spot.notices.notice import NoticeKind
from hf_spot.notices.signals import SignalSource
from tests.waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)


@contextmanager
def installed(source: SignalSource) -> Iterator[SignalSource]:
    source.install()
    try:
        yield source
    finally:
        source.restore()


@contextmanager
def process(code: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that has printed ``ready``."""
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        yield child
    finally:
        child.kill()
        child.communicate()


LISTEN = """
import sys, threading
from hf_spot.notices.signals import SignalSource
from hf_spot.notices.watcher import Watcher
source = SignalSource({signals}, grace_s=30)
heard = threading.Event()
def on_notice(notice):
    print(notice.kind.value, notice.id.split()[0], notice.deadline is not None, flush=True)
with Watcher([source], on_notice):
    print("ready", flush=True)
    sys.stdin.readline()
    print("count", source.count, flush=True)
    sys.stdin.readline()
print("restored", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_process_hears_its_signals_and_lives_on(name: str) -> None:
    with process(LISTEN.format(signals='("SIGTERM", "SIGUSR1")')) as child:
        assert child.stdout is not None and child.stdin is not None
        child.send_signal(signal.Signals[name])
        assert child.stdout.readline() == f"TERMINATE {name} True\n"


def test_a_second_signal_is_counted_and_is_no_new_notice() -> None:
    with process(LISTEN.format(signals='("SIGTERM", "SIGUSR1")')) as child:
        assert child.stdout is not None and child.stdin is not None
        child.send_signal(signal.SIGTERM)
        assert child.stdout.readline().startswith("TERMINATE SIGTERM")
        child.send_signal(signal.SIGUSR1)
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == "count 2\n"


def test_after_stop_the_signal_kills_as_it_did_before() -> None:
    with process(LISTEN.format(signals='("SIGTERM",)')) as child:
        assert child.stdout is not None and child.stdin is not None
        child.stdin.write("\n\n")
        child.stdin.flush()
        assert [child.stdout.readline(), child.stdout.readline()] == ["count 0\n", "restored\n"]
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=PATIENCE_S) == -signal.SIGTERM


FORK = """
import os, signal
from hf_spot.notices.signals import SignalSource
source = SignalSource(["SIGTERM"])
source.install()
print("ready", flush=True)
pid = os.fork()
if pid == 0:
    os.kill(os.getpid(), signal.SIGTERM)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), source.count, flush=True)
"""


def test_a_forked_child_dies_of_the_signal_as_if_nobody_listened() -> None:
    # Swallowed in a child, SIGTERM would make multiprocessing.Pool.terminate() wait for ever.
    with process(FORK) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == f"{-signal.SIGTERM} 0\n"


def test_nothing_is_heard_before_a_signal() -> None:
    with installed(SignalSource(["SIGUSR2"])) as source:
        assert source.poll() is None
        assert source.count == 0


def test_the_deadline_is_the_signal_plus_the_grace() -> None:
    with installed(SignalSource(["SIGUSR2"], grace_s=25, now=lambda: NOW)) as source:
        signal.raise_signal(signal.SIGUSR2)
        notice = source.poll()
    assert notice is not None
    assert (notice.kind, notice.source, notice.deadline) == (
        NoticeKind.TERMINATE,
        "signal",
        NOW + timedelta(seconds=25),
    )


def test_without_a_grace_there_is_no_deadline() -> None:
    with installed(SignalSource(["SIGUSR2"])) as source:
        signal.raise_signal(signal.SIGUSR2)
        notice = source.poll()
    assert notice is not None and notice.deadline is None


def test_a_second_different_signal_repeats_the_first_notice() -> None:
    with installed(SignalSource(["SIGUSR1", "SIGUSR2"], grace_s=10)) as source:
        signal.raise_signal(signal.SIGUSR1)
        first = source.poll()
        signal.raise_signal(signal.SIGUSR2)
        assert source.poll() == first
        assert source.count == 2


def test_after_reset_the_next_signal_is_a_new_notice() -> None:
    with installed(SignalSource(["SIGUSR1"])) as source:
        signal.raise_signal(signal.SIGUSR1)
        first = source.poll()
        source.reset()
        assert source.poll() is None
        signal.raise_signal(signal.SIGUSR1)
        second = source.poll()
    assert first is not None and second is not None and first.id != second.id


def test_an_earlier_handler_is_called_as_well_and_comes_back() -> None:
    called: list[int] = []

    def earlier(number: int, frame: object) -> None:
        called.append(number)

    before = signal.signal(signal.SIGUSR2, earlier)
    try:
        with installed(SignalSource(["SIGUSR2"])) as source:
            signal.raise_signal(signal.SIGUSR2)
            assert source.count == 1
        assert called == [signal.SIGUSR2]
        assert signal.getsignal(signal.SIGUSR2) is earlier
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_ctrl_c_can_be_a_notice_without_a_keyboard_interrupt() -> None:
    before = signal.getsignal(signal.SIGINT)
    with installed(SignalSource(["SIGINT"])) as source:
        signal.raise_signal(signal.SIGINT)
        assert source.count == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_a_handler_put_above_ours_stays_and_ours_passes_on_to_the_one_below() -> None:
    called: list[str] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: called.append("below"))
    try:
        source = SignalSource(["SIGUSR2"])
        source.install()
        ours = signal.getsignal(signal.SIGUSR2)
        assert callable(ours)

        def above(number: int, frame: object) -> None:
            called.append("above")
            ours(number, None)

        signal.signal(signal.SIGUSR2, above)
        source.restore()
        assert signal.getsignal(signal.SIGUSR2) is above
        signal.raise_signal(signal.SIGUSR2)
        assert called == ["above", "below"]
        assert source.count == 0
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_outside_the_main_thread_it_warns_and_hears_nothing(caplog: pytest.LogCaptureFixture) -> None:
    before = signal.getsignal(signal.SIGUSR2)
    source = SignalSource(["SIGUSR2"])
    thread = threading.Thread(target=source.install)
    thread.start()
    thread.join()
    assert "SIGUSR2" in caplog.text and "main thread" in caplog.text
    assert signal.getsignal(signal.SIGUSR2) is before


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP", "SIGSEGV", "SIGNOPE", ""])
def test_a_signal_that_can_not_be_used_is_refused_and_the_usable_ones_are_named(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SignalSource(["SIGTERM", name])
    assert repr(name) in str(caught.value)
    assert "SIGTERM" in caught.value.hint and "SIGKILL" not in caught.value.hint


def test_names_may_have_blanks_and_small_letters() -> None:
    assert SignalSource([" sigterm", "SIGUSR1 "]).where == "SIGTERM,SIGUSR1"


def test_no_signal_at_all_and_a_grace_of_nothing_are_refused() -> None:
    with pytest.raises(ConfigError):
        SignalSource([])
    with pytest.raises(ConfigError, match="grace_s=0"):
        SignalSource(["SIGTERM"], grace_s=0)


def test_a_handler_that_the_program_installs_later_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    source = SignalSource(("SIGUSR1",))
    with installed(source):
        source.poll()
        assert not caplog.records
        before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        source.poll()
        source.poll()
        assert caplog.text.count("installed its own handler for SIGUSR1") == 1
        signal.signal(signal.SIGUSR1, before)
