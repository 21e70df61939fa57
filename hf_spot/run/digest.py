"""Digests bind a checkpoint's files to the journal. Files are hashed while they move to or from a store, so that nothing is
read twice."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blake3 import blake3

from hf_spot.storage.store import Progress
from hf_spot.storage.threads import Workers

PART_BYTES = 64 << 20  # part of the format
FINE_PART_BYTES = 64 << 10  # part of the format
PART_DIGEST_BYTES = 32
_BLOCK_BYTES = 1 << 20
_THREADS = min(4, os.cpu_count() or 1)  # each hashes as much as a fast disk reads
_WHOLE, _PARTS, FINE = "blake3", "blake3-64m", "blake3-64k"
_HASHES: dict[str, Callable[[], Any]] = {_WHOLE: blake3, "sha256": hashlib.sha256}
NAMES = (*_HASHES, _PARTS, FINE)
_OF_SHARDS = ".distcp"  # of these files, each machine reads some parts


def name_for(file: str, size_bytes: int) -> str:
    """Return the hash for a new file, one of `NAMES`.

    Args:
        file: its name.
        size_bytes: its size.
    """
    if file.endswith(_OF_SHARDS) and size_bytes > FINE_PART_BYTES:
        return FINE
    return _WHOLE if size_bytes <= PART_BYTES else _PARTS


def digest_of(path: Path, hash: str | None = None, seen: Callable[[int, memoryview], object] | None = None) -> str:
    """Return a file's digest in the form of `hf_spot.run.manifest.FileEntry`. Large files are read by several threads.

    Args:
        path: of the file.
        hash: one of `NAMES`; by default the one for new files of this name and size.
        seen: called with each block that was read, and the byte of the file at which it begins, perhaps by several threads. It
            must not keep the block. An exception from it is raised.
    """
    name = hash or name_for(path.name, path.stat().st_size)
    if name in _HASHES:
        return f"{name}:{_hashed(_HASHES[name](), path, seen=seen).hexdigest()}"
    return combined(name, part_digests(path, name, seen))


def part_digests(path: Path, name: str = FINE, seen: Callable[[int, memoryview], object] | None = None) -> bytes:
    """Return the BLAKE3 digests of a file's parts, one after the other.

    Args:
        path: of the file.
        name: of the hash: ``blake3-64m`` or ``blake3-64k``.
        seen: as in `digest_of`.
    """
    size_bytes = path.stat().st_size

    def of_stretch(at: int) -> bytes:
        passing = Passing(size_bytes, name=name)
        block = memoryview(bytearray(_BLOCK_BYTES))
        with path.open("rb", buffering=0) as file:
            file.seek(at)
            end = min(at + PART_BYTES, size_bytes)
            while at < end and (count := file.readinto(block[: end - at])):
                passing.see(at, block[:count])
                if seen is not None:
                    seen(at, block[:count])
                at += count
        return b"".join(digest for _, digest in sorted(passing.done.items()))

    with Workers(_THREADS, "hf_spot-digest") as pool:
        return b"".join(pool.map(of_stretch, range(0, size_bytes, PART_BYTES)))


def combined(name: str, digests: bytes) -> str:
    """Return the digest of a file from those of its parts.

    Args:
        name: of the hash: ``blake3-64m`` or ``blake3-64k``.
        digests: of all parts, one after the other.
    """
    return f"{name}:{blake3(digests).hexdigest()}"


class Passing:
    """A `hf_spot.storage.store.Witness` that hashes a file while it moves, in whatever order its parts arrive.

    Args:
        size_bytes: of the file.
        progress: called with the number of bytes that have moved.
        name: of the hash, one of `NAMES`. What is not a form of BLAKE3 is not computed here.
    """

    def __init__(self, size_bytes: int, progress: Progress | None = None, *, name: str | None = None) -> None:
        self._size_bytes = size_bytes
        self._progress = progress
        self._name = name or name_for("", size_bytes)
        self._part_bytes = FINE_PART_BYTES if self._name == FINE else PART_BYTES
        if self._name == _WHOLE:
            self._part_bytes = max(PART_BYTES, size_bytes)
        self._begun: dict[int, tuple[Any, int]] = {}  # by number: a hash, and the offset at which its next block begins
        self.done: dict[int, bytes] = {}  # digests of the parts that have been seen to their end, by number

    def __call__(self, count: int) -> None:
        """Pass the number of bytes on to ``progress``."""
        if self._progress is not None:
            self._progress(count)

    def see(self, at: int, block: memoryview) -> None:
        """Hash a block that begins at byte ``at``.

        The blocks of one part must arrive in order. A block that begins a part again restarts its hash.
        """
        size = self._part_bytes
        while block:
            number, inside = divmod(at, size)
            piece, block = block[: size - inside], block[size - inside :]
            part, expected = self._begun.pop(number, (None, -1)) if inside else (blake3(), at)
            self.done.pop(number, None)
            at += len(piece)
            if part is not None and expected == at - len(piece):
                part.update(piece)
                if at == min((number + 1) * size, self._size_bytes):
                    self.done[number] = part.digest()
                else:
                    self._begun[number] = (part, at)

    def part_digests(self) -> bytes | None:
        """Return the digests of all parts, one after the other; None if not all of the file has been seen."""
        count = -(-self._size_bytes // self._part_bytes)
        if len(self.done) != count or any(number >= count for number in self.done):
            return None
        return b"".join(self.done[number] for number in range(count))

    def digest(self) -> str | None:
        """Return the same as `digest_of`, or None if not all of the file has been seen, or the hash is another."""
        digests = self.part_digests()
        if digests is None or self._name not in (_WHOLE, _PARTS, FINE):
            return None
        if self._name == _WHOLE:
            return f"{_WHOLE}:{(digests or blake3().digest()).hex()}"
        return combined(self._name, digests)


def _hashed(
    hash: Any,
    path: Path,
    at: int = 0,
    count_bytes: int = sys.maxsize,
    seen: Callable[[int, memoryview], object] | None = None,
) -> Any:
    """Return ``hash``, fed ``count_bytes`` bytes of the file from byte ``at`` on; `digest_of` explains ``seen``."""
    block = memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        file.seek(at)
        while count := file.readinto(block[:count_bytes]):
            hash.update(block[:count])
            if seen is not None:
                seen(at, block[:count])
            at += count
            count_bytes -= count
    return hash
