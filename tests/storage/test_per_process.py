"""What each process opens for itself, and files that appear only when they are whole."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hf_spot.storage.per_process import PerProcess, renamed_when_whole
from tests.waiting import PATIENCE_S


def test_threads_that_ask_at_once_get_one_and_the_same() -> None:
    opened: list[object] = []
    together = threading.Barrier(8)

    def open_slowly() -> object:
        opened.append(object())
        threading.Event().wait(0.05)
        return opened[-1]

    own = PerProcess(open_slowly)

    def get(_: int) -> object:
        together.wait(PATIENCE_S)
        return own.get()

    assert not own.is_open()
    with ThreadPoolExecutor(8) as threads:
        got = list(threads.map(get, range(8)))
    assert len(opened) == 1
    assert all(one is opened[0] for one in got)
    assert own.is_open()


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_child_opens_its_own_even_if_a_thread_was_opening_one_at_the_fork() -> None:
    opening, may_end = threading.Event(), threading.Event()

    def open_once() -> int:
        if os.getpid() == parent:
            opening.set()
            may_end.wait(PATIENCE_S)
        return os.getpid()

    parent = os.getpid()
    own = PerProcess(open_once)
    thread = threading.Thread(target=own.get)
    thread.start()
    assert opening.wait(PATIENCE_S)
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)  # the end of a child that waits for a thread that it does not have
        os._exit(0 if own.get() == os.getpid() else 1)
    may_end.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert own.get() == parent


def test_what_is_forgotten_is_opened_anew() -> None:
    own = PerProcess(object)
    first = own.get()
    own.forget()
    assert not own.is_open()
    assert own.get() is not first
    own.forget()
    own.forget()


def test_what_could_not_be_opened_is_tried_again() -> None:
    answers = iter([OSError("no way there"), "open"])

    def open_second_time() -> str:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    own = PerProcess(open_second_time)
    with pytest.raises(OSError, match="no way"):
        own.get()
    assert own.get() == "open"


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with renamed_when_whole(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
        assert file.name.parent == tmp_path  # type: ignore[union-attr]
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_failed_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> None:
        with renamed_when_whole(tmp_path / "file") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []
