"""Workers: a pool like any other, but for the end of the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import wait

import pytest

from hf_spot.storage.threads import Workers, awaited, result_of
from tests.waiting import PATIENCE_S, wait_for


def test_so_many_work_at_the_same_time_and_no_more() -> None:
    together = threading.Barrier(3)
    with Workers(3) as workers:
        assert sorted(job.result() for job in [workers.submit(together.wait, 30) for _ in range(6)]) == [0, 0, 1, 1, 2, 2]
        names = {workers.submit(lambda: threading.current_thread().name).result() for _ in range(20)}
    assert len(names) <= 3


def test_what_is_raised_reaches_who_asks() -> None:
    with Workers(1) as workers, pytest.raises(KeyError, match="why"):
        workers.submit({}.__getitem__, "why").result()


def test_a_signal_that_another_thread_gets_is_handled_while_a_result_is_awaited() -> None:
    handled = threading.Event()
    before = signal.signal(signal.SIGUSR2, lambda number, frame: handled.set())
    try:

        def signalled() -> bool:
            main = threading.main_thread().ident
            assert main is not None
            wait_for(lambda: sys._current_frames()[main].f_code.co_name == "wait", longest_pause_s=0.005)  # in `threading`
            time.sleep(0.05)  # now it waits for a lock
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)
            return handled.wait(PATIENCE_S / 10)

        with Workers(1) as workers:
            assert result_of(workers.submit(signalled))
    finally:
        signal.signal(signal.SIGUSR2, before)


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
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE_S)


@pytest.mark.skipif(not hasattr(os, "setpriority"), reason="needs priorities of threads")
def test_workers_stand_back_unless_somebody_waits_for_them() -> None:
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    mine = priority()
    assert Workers(1).submit(priority).result() == max(mine, 5)
    with awaited():
        assert Workers(1).submit(priority).result() == mine
    assert Workers(1).submit(priority).result() == max(mine, 5)
