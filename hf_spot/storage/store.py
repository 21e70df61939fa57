"""ObjectStore: the methods that a run needs of a place that keeps files. There are nine, and no others are used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol, runtime_checkable

Progress = Callable[[int], None]
"""Called with the number of bytes moved since the last call, from any thread. To cancel a transfer it raises an exception,
which ends the transfer and is raised to the caller."""


class Witness(Protocol):
    """A `Progress` that also sees the bytes, in stores that handle them themselves. `witness_of` finds it."""

    def __call__(self, count: int, /) -> None:
        """Report ``count`` bytes, as `Progress` does."""

    def see(self, at: int, block: memoryview, /) -> None:
        """Look at the block that begins at byte ``at`` of the file. The block is valid only during the call. Calls come from
        any thread, with the parts of a file in any order; a part that is moved again is shown again, from its start."""


def witness_of(progress: Progress | None) -> Callable[[int, memoryview], None]:
    """Return the function to show blocks to. If this progress is not a `Witness`, the function does nothing."""
    return getattr(progress, "see", lambda at, block: None)


@dataclass(frozen=True)
class ObjectInfo:
    """One listed object: ``key`` relative to the store's URL, ``size`` in bytes."""

    key: str
    size: int


@runtime_checkable
class ObjectStore(Protocol):
    """Keys are relative, ``/``-separated, without a leading slash and without ``..``.

    Every method may be called from several threads. For errors of the store, methods raise only subclasses of
    `hf_spot.errors.StoreError`: `StoreUnavailable` if the same call may succeed later, `ObjectNotFound`, `AccessDenied`,
    `BucketNotFound`. `put`, `put_file`, `copy` and `delete` are idempotent. `create` is not, and its answer can be lost, so
    callers read back.
    """

    @property
    def url(self) -> str:
        """Return the store's address, as a user writes it, without credentials."""

    def get(self, key: str) -> bytes:
        """Return the object's bytes. Raises ObjectNotFound."""

    def put(self, key: str, data: bytes) -> None:
        """Write or replace a small object. Readers see all of it or none."""

    def create(self, key: str, data: bytes) -> bool:
        """Write a small object only if the key does not exist. Return True if this call created it, False if it existed.

        The call is atomic across machines, and the object is durable when it returns. S3 uses ``If-None-Match: *``; a local
        store links a synced file.
        """

    def put_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        """Upload a file of any size. The object is durable when this returns, and never visible as a part."""

    def get_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        """Download to ``path``. Its folder must exist; an existing file is replaced. After an error it may be incomplete."""

    def copy(self, source: str, key: str) -> None:
        """Copy ``source`` to ``key``, if possible within the store, without moving the bytes through this machine. The copy is
        durable and complete when this returns. Raises ObjectNotFound."""

    def list(self, prefix: str = "", start_after: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects whose key starts with ``prefix`` and sorts after ``start_after``, in ascending order of keys. Pages
        are requested as needed."""

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects. A key that does not exist is not an error."""

    def abort(self, stale: Callable[[str], bool]) -> int:
        """Remove what unfinished uploads left, such as the parts uploaded by a process that was killed. Return the number of
        these uploads.

        Args:
            stale: returns whether a key, or the first folder of one (``e0007/``), is no longer written to.
        """


class RangeReader(Protocol):
    """A store that can also read a part of an object. `ranges_of` finds it."""

    def get_range(self, key: str, first: int, count: int) -> bytes:
        """Return ``count`` bytes from byte ``first`` on; fewer if the object ends before. Raises ObjectNotFound."""


def ranges_of(store: ObjectStore) -> Callable[[str, int, int], bytes] | None:
    """Return the method `RangeReader.get_range` of a store; None if it can't read a part of an object, like the Hub and stores
    that have only the nine methods: objects are then read as a whole."""
    found: Callable[[str, int, int], bytes] | None = getattr(store, "get_range", None)
    return found


@dataclass(frozen=True)
class Listed:
    """What a listing in groups shows.

    Args:
        key: of an object, relative to the store's URL; or what the keys of a group begin with, up to the delimiter.
        is_group: whether it stands for all objects whose keys begin so.
        size: of an object, in bytes.
        etag: changes with an object's bytes; empty if the store does not tell.
        written: when an object was written, by the store's clock; None if the store does not tell.
    """

    key: str
    is_group: bool = False
    size: int = 0
    etag: str = ""
    written: datetime | None = None


class GroupReader(Protocol):
    """A store that can also list many keys as one. `groups_of` finds it."""

    def list_groups(self, prefix: str, delimiter: str) -> Iterator[Listed]:
        """Yield the objects whose key starts with ``prefix``. Those that have the delimiter behind it may be shown as a group
        for each beginning up to its first occurrence, which saves requests. The order is of no account."""


def groups_of(store: ObjectStore) -> Callable[[str, str], Iterator[Listed]] | None:
    """Return the method `GroupReader.list_groups` of a store; None if it has none."""
    found: Callable[[str, str], Iterator[Listed]] | None = getattr(store, "list_groups", None)
    return found


def fences(store: ObjectStore) -> bool:
    """Return whether `create` can keep two machines apart, as the store declares it: a class that can't has the attribute
    ``fences = False``. `hf_spot.storage.probe` tests whether it really does."""
    return bool(getattr(store, "fences", True))
