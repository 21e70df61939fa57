"""ObjectStore: what a run needs of a place that keeps files. The nine methods are the whole surface."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

Progress = Callable[[int], None]
"""Called with the number of bytes moved since the last call, from any thread. An exception that it raises ends the
transfer and reaches the caller: that is how a transfer is cancelled."""


class Witness(Protocol):
    """A `Progress` that is shown what moves, too, by stores that have it in their hands: `witness_of` finds it."""

    def __call__(self, count: int, /) -> None:
        """As `Progress`."""

    def see(self, at: int, block: memoryview, /) -> None:
        """These bytes stand ``at`` bytes behind the file's start. The block is gone when this returns. From any thread, and in
        any order of the parts of a file; a part that is moved again is shown again, from its start."""


def witness_of(progress: Progress | None) -> Callable[[int, memoryview], None]:
    """What to show blocks to: nobody, if this progress is no `Witness`."""
    return getattr(progress, "see", lambda at, block: None)


@dataclass(frozen=True)
class ObjectInfo:
    """One listed object: ``key`` relative to the store's URL, ``size`` in bytes."""

    key: str
    size: int


@runtime_checkable
class ObjectStore(Protocol):
    """Keys are relative, ``/``-separated, without a leading slash and without ``..``.

    Every method may be called from several threads. Methods raise children of `hf_spot.errors.StoreError` and nothing
    else for trouble with the store: `StoreUnavailable` when the same call may work later, `ObjectNotFound`,
    `AccessDenied`, `BucketNotFound`. `put`, `put_file`, `copy`, `delete` are idempotent; `create` is not, and its answer can be
    lost: callers read back.
    """

    @property
    def url(self) -> str:
        """Where this store is, as the user would write it; never holds credentials."""

    def get(self, key: str) -> bytes:
        """The object's bytes. Raises ObjectNotFound."""

    def put(self, key: str, data: bytes) -> None:
        """Writes or replaces a small object; readers see all of it or none."""

    def create(self, key: str, data: bytes) -> bool:
        """Writes a small object only if none stands there: True if this call made it, False if one existed.

        Atomic across machines and durable when it returns. S3: ``If-None-Match: *``; local: ``link`` of a synced file.
        """

    def put_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        """Uploads a file of any size; durable and whole when it returns, invisible or whole before."""

    def get_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        """Downloads to ``path`` (its folder exists; an existing file is replaced). On error ``path`` may hold a part."""

    def copy(self, source: str, key: str) -> None:
        """Makes ``key`` hold what ``source`` holds, without moving it through this machine where the store can do that; durable
        and whole when it returns. Raises ObjectNotFound."""

    def list(self, prefix: str = "", start_after: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key starts with ``prefix`` and sorts after ``start_after``, ascending by key, lazily paged."""

    def delete(self, keys: Iterable[str]) -> None:
        """Deletes objects; a key that does not exist is no error."""

    def abort(self, stale: Callable[[str], bool]) -> int:
        """Removes what uploads left that never came to their end, such as the parts of a process that was killed; returns
        how many uploads these were.

        Args:
            stale: says of a key, or of the first folder of one (``e0007/``), that nobody writes there any more.
        """


def fences(store: ObjectStore) -> bool:
    """Whether `create` can keep two machines apart, as far as the store knows of itself: a class says that it can't by an
    attribute ``fences = False``. Whether it does is tried out by `hf_spot.storage.probe`."""
    return bool(getattr(store, "fences", True))
