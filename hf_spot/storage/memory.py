"""MemoryStore: objects in this process's memory, for tests and experiments."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from hf_spot.errors import ConfigError, ObjectNotFound
from hf_spot.storage.keys import check_key, check_prefix
from hf_spot.storage.store import ObjectInfo, Progress

_CHUNK_BYTES = 1 << 20

_spaces: dict[str, dict[str, bytes]] = {}
_lock = threading.Lock()  # only `create` takes more than one step
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class MemoryStore:
    """An `ObjectStore` that lasts as long as the process. Stores with the same URL share their objects.

    Args:
        url: ``memory://name``; any name.

    Raises:
        ConfigError: another kind of URL.
    """

    def __init__(self, url: str = "memory://default") -> None:
        name = url.removeprefix("memory://").strip("/")
        if not url.startswith("memory://") or not name:
            raise ConfigError(f"{url!r} is not the URL of a memory store", hint="memory://any-name")
        self._url = f"memory://{name}"
        self._objects = _spaces.setdefault(name, {})

    @property
    def url(self) -> str:
        """Return the URL of the store."""
        return self._url

    def get(self, key: str) -> bytes:
        """Return the object's bytes. Raises ObjectNotFound."""
        try:
            return self._objects[check_key(key)]
        except KeyError:
            raise ObjectNotFound(f"{self._url}/{key} does not exist") from None

    def get_range(self, key: str, first: int, count: int) -> bytes:
        """Return a part of the object's bytes. Raises ObjectNotFound."""
        return self.get(key)[first : first + count]

    def put(self, key: str, data: bytes) -> None:
        """Write or replace the object."""
        self._objects[check_key(key)] = bytes(data)

    def create(self, key: str, data: bytes) -> bool:
        """Write the object if it does not exist. Of several threads that try, one gets True."""
        check_key(key)
        with _lock:
            if key in self._objects:
                return False
            self._objects[key] = bytes(data)
            return True

    def put_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        """Read the file into memory."""
        check_key(key)
        chunks = []
        with open(path, "rb") as source:
            while chunk := source.read(_CHUNK_BYTES):
                chunks.append(chunk)
                if progress is not None:
                    progress(len(chunk))
        self._objects[key] = b"".join(chunks)

    def get_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        """Write the object to ``path``."""
        data = self.get(key)
        with open(path, "wb") as target:
            for start in range(0, len(data), _CHUNK_BYTES):
                chunk = data[start : start + _CHUNK_BYTES]
                target.write(chunk)
                if progress is not None:
                    progress(len(chunk))

    def copy(self, source: str, key: str) -> None:
        """Write the bytes of ``source`` to ``key``, too."""
        self.put(key, self.get(source))

    def list(self, prefix: str = "", start_after: str = "") -> Iterator[ObjectInfo]:
        """Yield the present objects, sorted by key."""
        check_prefix(prefix)
        for key in sorted(self._objects.copy()):
            if key.startswith(prefix) and key > start_after and (data := self._objects.get(key)) is not None:
                yield ObjectInfo(key, len(data))

    def delete(self, keys: Iterable[str]) -> None:
        """Delete the objects."""
        for key in keys:
            self._objects.pop(check_key(key), None)

    def abort(self, stale: Callable[[str], bool]) -> int:
        """Return 0: nothing outlives this process."""
        return 0
