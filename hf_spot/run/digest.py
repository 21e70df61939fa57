"""Digests bind a checkpoint's files to the journal. What passes by on its way to or from a store is hashed in passing, so that
nothing is read twice."""

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
    """The digest of a file as a `hf_spot.run.manifest.FileEntry` has it, read in blocks; a large one by several threads.

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
    """A `hf_spot.storage.store.Witness` that hashes a file on its way, whatever order its parts come in.

    Args:
        size_bytes: of the file.
        progress: told of the bytes that move.
    """

    def __init__(self, size_bytes: int, progress: Progress | None = None) -> None:
        self._size_bytes = size_bytes
        self._progress = progress
        self._parts: dict[int, tuple[Any, int]] = {}  # by number: a hash, and where the next block of it begins

    def __call__(self, count: int) -> None:
        """Passed on."""
        if self._progress is not None:
            self._progress(count)

    def see(self, at: int, block: memoryview) -> None:
        """Blocks of one part come one after the other; one that begins a part again begins its hash again."""
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
        """As `digest_of`; None when it has not seen all of the file."""
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
    """BLAKE3, in hex, of the BLAKE3 digests of the parts."""
    return blake3(b"".join(part.digest() for part in parts)).hexdigest()


def _hashed(hash: Any, path: Path, at: int = 0, count_bytes: int = sys.maxsize) -> Any:
    """Has seen so many bytes of the file."""
    block = memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        file.seek(at)
        while count := file.readinto(block[:count_bytes]):
            hash.update(block[:count])
            count_bytes -= count
    return hash
