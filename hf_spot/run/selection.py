"""Decide which files of a checkpoint, and which parts of its shards, a machine's ranks read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from hf_spot.policy.shard_reads import Value, length, ranges_read
from hf_spot.run.manifest import FileEntry, needed_by
from hf_spot.run.parts import Parts, all_parts, can_be_parted
from hf_spot.run.shard_index import INDEX_NAME, UnknownIndex, values_in

log = logging.getLogger("hf_spot")

_WHOLE_FROM = 0.9  # of a file: then it is fetched as a whole, by fewer and larger requests
_SHARD = ".distcp"


@dataclass(frozen=True)
class Selection:
    """What a machine needs of a checkpoint.

    Args:
        whole: files.
        parts: of further files.
    """

    whole: tuple[FileEntry, ...]
    parts: tuple[Parts, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Return how many bytes that is."""
        return sum(file.size for file in self.whole) + sum(one.size_bytes for one in self.parts)


@dataclass(frozen=True)
class Readers:
    """The ranks that read a checkpoint from one disk.

    Args:
        ranks: their numbers.
        world_size: number of all ranks.
    """

    ranks: tuple[int, ...]
    world_size: int


def select(
    files: Sequence[FileEntry],
    saved_world_size: int,
    readers: Readers | None,
    read: Callable[[FileEntry], bytes],
    *,
    in_parts: bool = True,
) -> Selection:
    """Return what some ranks read of a checkpoint.

    Args:
        files: all files of the checkpoint.
        saved_world_size: number of ranks that saved it.
        readers: the ranks; None for all that there are.
        read: returns the verified contents of a file.
        in_parts: whether parts of files can be fetched; otherwise shards are fetched as a whole.
    """
    if readers is None:
        return Selection(tuple(files))
    same = readers.world_size == saved_world_size
    whole = list(needed_by(files, readers.ranks) if same else files)
    parts: list[Parts] = []
    for index in [file for file in whole if PurePosixPath(file.path).name == INDEX_NAME] if in_parts else []:
        folder = PurePosixPath(index.path).parent
        shards = [file for file in whole if PurePosixPath(file.path).parent == folder and file.path.endswith(_SHARD)]
        if not shards:
            continue
        try:
            values = values_in(read(index))
        except UnknownIndex as why:
            log.info("%s can't be read, so its shards are fetched as a whole: %s", index.path, why)
            continue
        for file, needed in zip(shards, _needed(shards, values, readers, saved_world_size), strict=True):
            if needed is not None:
                whole.remove(file)
                if needed.numbers:
                    parts.append(needed)
    return Selection(tuple(whole), tuple(parts))


def _needed(shards: Collection[FileEntry], values: list[Value], readers: Readers, saved_world_size: int) -> list[Parts | None]:
    """Return the parts that are needed of each shard; None if it is the whole of it."""
    ranges = ranges_read(values, readers.ranks, readers.world_size, saved_world_size)
    found: list[Parts | None] = []
    for file in shards:
        needed = ranges.get(PurePosixPath(file.path).name, [])
        too_much = length(needed) >= _WHOLE_FROM * file.size
        beyond = bool(needed) and needed[-1][1] > file.size
        if needed and (too_much or beyond or not can_be_parted(file)):
            found.append(None)
        else:
            one = all_parts(file, needed)
            found.append(None if needed and one.size_bytes >= _WHOLE_FROM * file.size else one)
    return found
