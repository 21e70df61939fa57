"""Copies of checkpoints in the memory of a machine, which outlive the processes of a training.

`hf-spot launch` makes two halves of memory when it starts, and holds them while it runs. The training copies the files of each
checkpoint into the half that is not the newest, and computes their digests while it copies. The index of a half (names, sizes,
digests, the launch, the run) comes last and is sealed as the journal is; before the first byte of a copy the half is marked as
empty. So a copy that a kill has cut short never counts, and the other half is whole meanwhile. Whoever takes a copy compares
every file with its digest: neither the memory nor its index is trusted beyond that.

The halves are anonymous files (``memfd_create``), which a training opens through ``/proc/LAUNCHER/fd``: accelerate and torchrun
close inherited descriptors. Files in /dev/shm were the alternative, and are worse in four ways. They stay when the launcher is
killed, and then hold memory until the machine restarts. Containers have 64 MB of /dev/shm unless somebody has asked for more,
while an anonymous file is limited as all other memory is. Their names are visible to other users. Cleanups may delete them.
A half is read and written, never mapped: so processes that the training forks share no pages with it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_spot.errors import CorruptCheckpoint, SpotError
from hf_spot.policy.memory_tier import COPIES
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.digest import digest_of
from hf_spot.run.local_copies import LocalCopy
from hf_spot.run.manifest import FileEntry, files_in
from hf_spot.run.seal import LARGEST, seal, unseal

log = logging.getLogger("hf_spot")

_NAME = "hf_spot"
_HEADER = struct.Struct("<8s2Q")  # _MAGIC, the byte at which the index begins, its length
_MAGIC = b"hf_spot1"
_PAGE_BYTES = 4096
_LARGEST_INDEX_BYTES = 64 << 20


def create() -> tuple[int, ...]:
    """Create memory for copies, empty, and return the descriptors that keep it; none on systems that have no such memory.

    Raises:
        OSError: the system refuses it.
    """
    made: list[int] = []
    try:
        while hasattr(os, "memfd_create") and len(made) < COPIES:
            made.append(os.memfd_create(_NAME, os.MFD_CLOEXEC))
    except BaseException:
        for one in made:
            os.close(one)
        raise
    return tuple(made)


@dataclass(frozen=True)
class MemoryCopy:
    """One whole copy.

    Args:
        copy: its index.
        serial: larger for newer ones.
        half: number of the half that has it.
    """

    copy: LocalCopy
    serial: int
    half: int


class MemoryCopies:
    """The memory that `create` has made, as a process of the launch uses it, until `close`.

    Args:
        paths: of the halves: ``/proc/LAUNCHER/fd/NUMBER``.

    Raises:
        OSError: they can't be opened: the launcher has ended, or this process may not look into it.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._halves: list[int] = []
        try:
            for path in paths:
                self._halves.append(os.open(path, os.O_RDWR | os.O_CLOEXEC))
                if not os.readlink(path).startswith(f"/memfd:{_NAME} "):
                    raise FileNotFoundError(f"{path} is no memory of a launch")
        except BaseException:
            self.close()
            raise

    @property
    def held_bytes(self) -> int:
        """Return the memory that the copies take."""
        return sum(os.fstat(half).st_blocks * 512 for half in self._halves)

    def keep(self, run: str, launch: int, request: CommitRequest, folder: Path, key: bytes | None) -> tuple[FileEntry, ...]:
        """Copy a checkpoint, or this disk's part of it, into the half that is not the newest. Return its files.

        Args:
            run: id of the first entry of the run's journal.
            launch: number of this launch.
            request: as it was submitted for upload.
            folder: with the files.
            key: that the journal is signed with; None for none.

        Raises:
            OSError: there is no room, or the folder changes meanwhile.
        """
        whole = self.copies(key)
        newest = whole[0].half if whole else None
        number = next(at for at in range(len(self._halves)) if at != newest)
        serial = 1 + max((one.serial for one in whole), default=0)
        half = self._halves[number]
        os.pwrite(half, bytes(_HEADER.size), 0)
        files = []
        sizes = {name: (folder / name).stat().st_size for name in files_in(folder)}
        begins = _layout(list(sizes.values()))
        for (name, size_bytes), begin in zip(sizes.items(), begins, strict=False):
            files.append(FileEntry(name, size_bytes, _copy_in(folder / name, size_bytes, half, begin)))
        copy = LocalCopy(run, launch, request, tuple(files))
        index = seal({"serial": serial, **copy.to_data()}, key)
        _write(half, memoryview(index), begins[-1])
        os.ftruncate(half, begins[-1] + len(index))
        os.pwrite(half, _HEADER.pack(_MAGIC, begins[-1], len(index)), 0)
        return copy.files

    def copies(self, key: bytes | None) -> list[MemoryCopy]:
        """Return the copies that are whole by their index, newest first.

        Args:
            key: that the journal is signed with; None for none.
        """
        found = []
        for number, half in enumerate(self._halves):
            try:
                magic, begin, length = _HEADER.unpack(os.pread(half, _HEADER.size, 0).ljust(_HEADER.size, b"\0"))
                if magic != _MAGIC:  # empty, or a copy was under way
                    continue
                if length > _LARGEST_INDEX_BYTES or begin > LARGEST:
                    raise CorruptCheckpoint("its index is too large")
                told = unseal(os.pread(half, length, begin), key)
                copy, serial = LocalCopy.of(told), told["serial"]
                if type(serial) is not int or _layout([file.size for file in copy.files])[-1] != begin:
                    raise CorruptCheckpoint("its index is of another copy")
                found.append(MemoryCopy(copy, serial, number))
            except (OSError, SpotError, ValueError, TypeError, KeyError) as error:
                log.warning("a copy of a checkpoint in this machine's memory is ignored: %s", error)
        return sorted(found, key=lambda one: one.serial, reverse=True)

    def write_out(self, kept: MemoryCopy, folder: Path) -> None:
        """Write the files of a copy into a new folder. They must be compared with their digests.

        Raises:
            OSError: they can't be written, or a newer copy takes their place.
        """
        folder.mkdir(parents=True)
        begins = _layout([file.size for file in kept.copy.files])
        for file, begin in zip(kept.copy.files, begins, strict=False):
            path = folder / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as target:
                at, end = begin, begin + file.size
                while at < end:
                    if not (count := os.sendfile(target.fileno(), self._halves[kept.half], at, end - at)):
                        raise OSError(f"{file.path} is not all in memory")
                    at += count

    def clear(self) -> None:
        """Forget all copies, and release their memory."""
        for half in self._halves:
            os.ftruncate(half, 0)

    def close(self) -> None:
        """Close this process's descriptors. The launcher's own keep the copies."""
        while self._halves:
            with contextlib.suppress(OSError):
                os.close(self._halves.pop())


def _layout(sizes_bytes: Sequence[int]) -> list[int]:
    """Return the bytes at which files begin in a half, and, as the last one, at which its index does."""
    begins = [_PAGE_BYTES]
    for size_bytes in sizes_bytes:
        begins.append(-(-(begins[-1] + size_bytes) // _PAGE_BYTES) * _PAGE_BYTES)
    return begins


def _copy_in(path: Path, size_bytes: int, half: int, begin: int) -> str:
    """Copy a file, and return its digest."""
    digest = digest_of(path, seen=lambda at, block: _write(half, block, begin + at))
    if path.stat().st_size != size_bytes:  # then it may have run into the next file's place
        raise OSError(f"{path} changes while it is copied")
    return digest


def _write(half: int, block: memoryview, at: int) -> None:
    while block:
        count = os.pwrite(half, block, at)
        block, at = block[count:], at + count
