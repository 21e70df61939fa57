"""Workers: a pool like any other, but for the end of the process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import zlib
from concurrent.futures import wait
from pathlib import Path

import pytest

from hf_spot.storage.threads import Workers, step_aside
from tests.waiting import wait_for


def test_so_many_work_at_the_same_time_and_no_more() -> None:
    together = threading.Barrier(3)
    with Workers(3) as workers:
        assert sorted(job.result() for job in [workers.submit(together.wait, 30) for _ in range(6)]) == [0, 0, 1, 1, 2, 2]
        names = {workers.submit(lambda: threading.current_thread().name).result() for _ in range(20)}
    assert len(names) <= 3


def test_what_is_raised_reaches_who_asks() -> None:
    with Workers(1) as workers, pytest.raises(KeyError, match="why"):
        workers.submit({}.__getitem__, "why").result()


def test_what_has_not_begun_can_be_cancelled_and_nothing_more_is_taken() -> None:
    go_on = threading.Event()
    workers = Workers(1)
    under_way = workers.submit(go_on.wait)
    wait_for(under_way.running)
    waiting = [workers.submit(int) for _ in range(3)]
    workers.shutdown(wait=False, cancel_futures=True)
    assert all(job.cancelled() for job in waiting)
    with pytest.raises(RuntimeError, match="shut down"):
        workers.submit(int)
    go_on.set()
    assert under_way.result() is True


def test_threads_end_when_nobody_can_ask_them_any_more() -> None:
    before = threading.active_count()
    workers = Workers(4)
    wait([workers.submit(int) for _ in range(8)])
    assert threading.active_count() > before
    del workers
    wait_for(lambda: threading.active_count() == before)


def test_a_call_that_never_returns_keeps_no_process_alive() -> None:
    code = "import threading; from hf_spot.storage.threads import Workers; Workers(1).submit(threading.Event().wait)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.skipif(
    len(getattr(os, "sched_getaffinity", lambda _: [0])(0)) < 2, reason="one processor, or a system that has no affinity"
)
def test_they_leave_its_processor_to_a_main_thread_that_works_and_take_it_when_that_waits() -> None:
    everywhere = os.sched_getaffinity(0)
    work, seen = bytes(1 << 20), set()

    def where() -> frozenset[int]:
        step_aside()
        return frozenset(os.sched_getaffinity(0))

    def where_while_main_waits() -> frozenset[int]:
        state = Path(f"/proc/self/task/{os.getpid()}/stat")
        wait_for(lambda: state.read_text().rpartition(")")[2].split()[0] == "S", "for the main thread to wait")
        return where()

    with Workers(1) as workers:
        for _ in range(50):
            job = workers.submit(where)
            while not job.done():
                zlib.crc32(work)  # without the interpreter's lock
            seen.add(len(job.result()))
        assert len(everywhere) - 1 in seen
        assert workers.submit(where_while_main_waits).result() == everywhere
