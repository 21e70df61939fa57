"""Shared by several stores: objects that each process opens for itself, and files that appear only when they are complete."""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")


class PerProcess(Generic[T]):
    """Open something once in each process: sockets and threads don't survive a fork. Usable from threads.

    Args:
        open: opens it; called when it is first needed.
    """

    def __init__(self, open: Callable[[], T]) -> None:
        self._open = open
        self._opened: dict[int, T] = {}  # by process id
        self._locks: dict[int, threading.Lock] = {}  # by process id, too: a lock may be held by a thread that was not forked

    def get(self) -> T:
        """Return this process's own. Raises any error of opening it."""
        process = os.getpid()
        if process not in self._opened:
            with self._locks.setdefault(process, threading.Lock()):
                if process not in self._opened:
                    self._opened[process] = self._open()
        return self._opened[process]

    def is_open(self) -> bool:
        """Return whether this process has opened it."""
        return os.getpid() in self._opened

    def forget(self) -> None:
        """Have the next call open it again. Threads that use the present one may continue to do so."""
        self._opened.pop(os.getpid(), None)


@contextlib.contextmanager
def renamed_when_whole(path: Path) -> Iterator[FileIO]:
    """Open a hidden file beside ``path``. It is renamed to ``path`` at the end of the block, or deleted if the block raises."""
    path = Path(path)
    beside = path.with_name(f".hf_spot-{uuid.uuid4().hex}")
    try:
        with FileIO(beside, "x+") as file:
            yield file
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
