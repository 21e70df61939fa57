"""Digests bind a checkpoint's files to the journal. Files are hashed while they move to or from a store, so that nothing is
read twice."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from blake3 import blake3

from hf_spot.storage.store import Progress
from hf_spot.storage.threads import Workers

PART_BYTES = 64 << 20  # part of the format
_BLOCK_BYTES = 1 << 20
_THREADS = min(4, os.cpu_count() or 1)  # each hashes as much as a fast disk reads
_WHOLE, _PARTS = "blake3", "blake3-64m"
_HASHES: dict[str, Callable[[], Any]] = {_WHOLE: blake3, "sha256": hashlib.sha256}
NAMES = (*_HASHES, _PARTS)


def digest_of(path: Path, hash: str | None = None) -> str:
    """Return a file's digest in the form of `hf_spot.run.manifest.FileEntry`. Large files are read by several threads.

    Args:
        path: of the file.
        hash: one of `NAMES`; by default the one for new files of this size.
    """
    size_bytes = path.stat().st_size
    name = hash or _name_for(size_bytes)
    if name != _PARTS:
        return f"{name}:{_hashed(_HASHES[name](), path).hexdigest()}"
    with Workers(_THREADS, "hf_spot-digest") as pool:
        parts = [pool.submit(_hashed, blake3(), path, at, PART_BYTES) for at in range(0, size_bytes, PART_BYTES)]
        return f"{_PARTS}:{_combined(part.result() for part in parts)}"


class Passing:
    """A `hf_spot.storage.store.Witness` that hashes a file while it moves, in whatever order its parts arrive.

    Args:
        size_bytes: of the file.
        progress: called with the number of bytes that have moved.
    """

    def __init__(self, size_bytes: int, progress: Progress | None = None) -> None:
        self._size_bytes = size_bytes
        self._progress = progress
        self._parts: dict[int, tuple[Any, int]] = {}  # by number: a hash, and the offset at which its next block begins

    def __call__(self, count: int) -> None:
        """Pass the number of bytes on to ``progress``."""
        if self._progress is not None:
            self._progress(count)

    def see(self, at: int, block: memoryview) -> None:
        """Hash a block that begins at byte ``at``.

        The blocks of one part must arrive in order. A block that begins a part again restarts its hash.
        """
        while block:
            number, inside = divmod(at, PART_BYTES)
            piece, block = block[: PART_BYTES - inside], block[PART_BYTES - inside :]
            part, expected = self._parts.get(number, (None, -1)) if inside else (blake3(), at)
            if part is None or expected != at:
                self._parts[number] = (None, -1)
            else:
                part.update(piece)
                self._parts[number] = (part, at + len(piece))
            at += len(piece)

    def digest(self) -> str | None:
        """Return the same as `digest_of`, or None if not all of the file has been seen."""
        ends = range(PART_BYTES, self._size_bytes, PART_BYTES)
        wanted = [*ends, self._size_bytes] if self._size_bytes else []
        if [end for _, (_, end) in sorted(self._parts.items())] != wanted:
            return None
        if _name_for(self._size_bytes) == _WHOLE:
            return f"{_WHOLE}:{(self._parts[0][0] if self._parts else blake3()).hexdigest()}"
        return f"{_PARTS}:{_combined(part for _, (part, _) in sorted(self._parts.items()))}"


def _name_for(size_bytes: int) -> str:
    return _WHOLE if size_bytes <= PART_BYTES else _PARTS


def _combined(parts: Iterable[Any]) -> str:
    """Return the BLAKE3, in hex, of the BLAKE3 digests of the parts."""
    return blake3(b"".join(part.digest() for part in parts)).hexdigest()


def _hashed(hash: Any, path: Path, at: int = 0, count_bytes: int = sys.maxsize) -> Any:
    """Return ``hash`` after it has been fed ``count_bytes`` bytes of the file, from byte ``at`` on."""
    block = memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        file.seek(at)
        while count := file.readinto(block[:count_bytes]):
            hash.update(block[:count])
            count_bytes -= count
    return hash
