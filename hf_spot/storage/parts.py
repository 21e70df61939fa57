"""Move files in parts, several at a time, and end all parts when one of them fails or the transfer is cancelled."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any, TypeVar

from hf_spot.errors import SpotError
from hf_spot.storage.store import Progress, witness_of
from hf_spot.storage.threads import Workers

BLOCK_BYTES = 1 << 20  # uploads: small enough to be read, hashed and sent while it is in the processor's cache
BLOCK_IN_BYTES = 4 << 20  # downloads: large enough for huge pages, which makes them a fifth faster

T = TypeVar("T")
R = TypeVar("R")


class Stopped(Exception):
    """Ends one part, because another one has failed or the transfer was cancelled."""


class Job:
    """One transfer: its progress, and the first error in any of its parts."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self.see = witness_of(progress)
        self._lock = threading.Lock()
        self._trouble: BaseException | None = None

    def may_go_on(self) -> None:
        """Raise Stopped if a part has failed or the transfer was cancelled."""
        if self._trouble is not None:
            raise Stopped

    def fail(self, error: BaseException) -> None:
        """Record an error; only the first is kept."""
        with self._lock:
            self._trouble = self._trouble or error

    def moved(self, count: int) -> None:
        """Report ``count`` bytes to the progress callback. An exception that it raises ends the transfer; it is recorded, and
        Stopped is raised in its place."""
        if self._progress is None:
            return
        with self._lock:
            if self._trouble is None:
                try:
                    self._progress(count)
                    return
                except BaseException as error:
                    self._trouble = error
        raise Stopped

    def doing(self, act: Callable[[T], R], item: T) -> R:
        """Call ``act``, unless another part has failed. Record its error if it fails."""
        self.may_go_on()
        try:
            return act(item)
        except BaseException as error:
            self.fail(error)
            raise

    @contextlib.contextmanager
    def ending(self, futures: list[Future[Any]]) -> Iterator[None]:
        """Wait for all parts before the block is left, because the file is about to be closed. Cancel the rest if one fails."""
        try:
            yield
            wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                future.result()
        except BaseException as error:
            self.fail(error)
            for future in futures:
                future.cancel()
            wait(futures)
            raise

    @contextlib.contextmanager
    def first_trouble(self) -> Iterator[None]:
        """Raise the transfer's first error instead of an error that followed from it."""
        try:
            yield
        except BaseException as error:
            if self._trouble is not None and self._trouble is not error:
                raise self._trouble from None
            raise

    def in_parts(self, workers: Workers, act: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Have ``workers`` call ``act`` for each item, and return the results once all have ended. Raises the first error."""
        with self.first_trouble():
            futures = [workers.submit(self.doing, act, item) for item in items]
            with self.ending(futures):
                return [future.result() for future in futures]


class Piece:
    """A part of an open file, in the form that botocore needs for a body. It uses ``pread``: parts share the file's handle."""

    def __init__(self, job: Job, handle: int, first: int, size: int) -> None:
        self._job = job
        self._handle = handle
        self._first = first
        self._size = size
        self._at = 0
        self._told = 0

    def __len__(self) -> int:
        return self._size

    def read(self, count: int = -1) -> bytes:
        """Read as a file does."""
        count = self._size - self._at if count is None or count < 0 else min(count, self._size - self._at)
        block = os.pread(self._handle, count, self._first + self._at)
        self._at += len(block)
        return block

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Seek as a file does."""
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        """Return the position, as a file does."""
        return self._at

    def blocks(self) -> Iterator[memoryview]:
        """Yield the whole part in blocks, which share one buffer: each is overwritten by the next. Raises SpotError."""
        buffer = memoryview(bytearray(min(BLOCK_BYTES, self._size)))
        at = 0
        while at < self._size:
            got = os.preadv(self._handle, [buffer[: self._size - at]], self._first + at)
            if not got:
                raise SpotError("a file became shorter while it was uploaded; this checkpoint is not committed")
            yield buffer[:got]
            at += got

    def __iter__(self) -> Iterator[memoryview]:
        """Yield the blocks as they are sent. When a part is sent again, its earlier progress is subtracted."""
        try:
            if self._told:
                self._job.moved(-self._told)
                self._told = 0
            for block in self.blocks():
                self._job.may_go_on()
                self._job.see(self._first + self._told, block)
                yield block
                self._told += len(block)
                self._job.moved(len(block))
        except (OSError, SpotError) as error:
            # Raised here, the error would count as a broken connection and be retried.
            self._job.fail(error)
            raise Stopped from error


def write_at(handle: int, rest: memoryview, at: int) -> None:
    """Write all of ``rest`` to an open file, from byte ``at`` on."""
    while rest:
        written = os.pwrite(handle, rest, at)
        rest, at = rest[written:], at + written
