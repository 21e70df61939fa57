"""Background threads, which never keep a process from ending, even if they hang, and leave the processor to the training."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, wait
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_Job = tuple["Future[Any]", Callable[[], Any]]


_SIGNAL_S = 0.5  # until a notice is seen that another thread was interrupted for
_NICE = 5  # a quarter of a processor while training needs it, else all of it
_awaited = 0  # how many blocks of `awaited` are open


def result_of(future: Future[T]) -> T:
    """Return the result of a future. Raises its exception.

    The system may hand a signal to any thread, and Python's handler then runs once the main thread does: so that wakes up.
    """
    while not wait([future], _SIGNAL_S).done:
        pass
    return future.result()


@contextlib.contextmanager
def awaited() -> Iterator[None]:
    """Let threads that are started within the block keep their priority: somebody waits for a command, and no training runs in
    this process."""
    global _awaited
    _awaited += 1
    try:
        yield
    finally:
        _awaited -= 1


def stand_back() -> None:
    """Give the calling thread a low priority, so that training and its DataLoader workers come first. Linux sets it for one
    thread."""
    if hasattr(os, "setpriority") and not _awaited:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


class Workers(Executor):
    """A ``ThreadPoolExecutor`` with daemon threads of low priority. At the end of a process Python waits for the threads of its
    own executor, so a request that a store never answers would keep a machine that is about to be taken away.

    Args:
        max_workers: maximum number of threads; each is started when it is first needed.
        thread_name_prefix: prefix of the threads' names.
    """

    def __init__(self, max_workers: int, thread_name_prefix: str = "hf_spot") -> None:
        self._max_workers = max_workers
        self._name = thread_name_prefix
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._closed = False
        # The threads refer to the queue and not to this object, so they end when nobody can submit any more.
        weakref.finalize(self, self._jobs.put, None).atexit = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Have a thread call ``fn``. Raises RuntimeError after `shutdown`."""
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("these workers have been shut down")
            self._jobs.put((future, partial(fn, *args, **kwargs)))
            if not self._idle.acquire(blocking=False) and len(self._threads) < self._max_workers:
                name = f"{self._name}_{len(self._threads)}"
                thread = threading.Thread(target=_work, args=(self._jobs, self._idle), name=name, daemon=True)
                self._threads.append(thread)
                thread.start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more jobs. With ``wait``, wait until all submitted jobs are done; with ``cancel_futures``, cancel those
        that have not started."""
        with self._lock:
            self._closed = True
            while cancel_futures:
                try:
                    job = self._jobs.get_nowait()
                except Empty:
                    break
                if job is not None:
                    job[0].cancel()
            self._jobs.put(None)
        if wait:
            for thread in self._threads:
                thread.join()


def _work(jobs: SimpleQueue[_Job | None], idle: threading.Semaphore) -> None:
    stand_back()
    while (job := jobs.get()) is not None:
        future, act = job
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(act())
            except BaseException as error:
                future.set_exception(error)
        del job, future, act  # they may refer to large objects
        idle.release()
    jobs.put(None)  # the next thread ends, too
