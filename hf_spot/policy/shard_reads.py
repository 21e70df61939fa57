"""Which bytes of a sharded checkpoint some ranks read, without a model: what torch's planner will ask for is foreseen.

A wrong forecast costs a second request for what is missing, and nothing else: whoever reads asks for what the planner really
wants.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

Stretch = tuple[int, int]
"""The first of some consecutive numbers, and the one after the last."""


@dataclass(frozen=True)
class Chunk:
    """A piece of a tensor, as it lies in a file.

    Args:
        file: its name.
        first: offset of its first byte.
        size_bytes: its length there.
        rows: the rows of the tensor that it has; None if they are not all of them whole, or it is no tensor.
    """

    file: str
    first: int
    size_bytes: int
    rows: Stretch | None


@dataclass(frozen=True)
class Value:
    """A tensor or another value of a checkpoint.

    Args:
        rows: size of the first dimension; 0 if there is none.
        chunks: all of its pieces.
    """

    rows: int
    chunks: tuple[Chunk, ...]


def ranges_read(
    values: Iterable[Value], ranks: Collection[int], world_size: int, saved_world_size: int
) -> Mapping[str, list[Stretch]]:
    """Return the bytes that some ranks read, by file, in ascending order. Files that they don't read are left out.

    FSDP divides the rows of each tensor among the ranks as torch.chunk does, or, if it replicates (HSDP), among as many
    consecutive ranks as there were chunks. What is in one piece is read by every rank.

    Args:
        values: of the checkpoint.
        ranks: the ranks that read.
        world_size: number of all ranks.
        saved_world_size: number of ranks that saved the checkpoint.
    """
    values = list(values)
    shards = max((len(value.chunks) for value in values), default=1)
    is_replicated = 1 < shards < saved_world_size and saved_world_size % shards == 0 and world_size % shards == 0
    if not is_replicated:
        shards = world_size
    found: dict[str, list[Stretch]] = {}
    for value in values:
        each = -(-value.rows // shards)
        mine = [(rank % shards * each, min((rank % shards + 1) * each, value.rows)) for rank in ranks]
        for chunk in value.chunks:
            if len(value.chunks) == 1 or chunk.rows is None or any(_overlap(chunk.rows, rows) for rows in mine):
                found.setdefault(chunk.file, []).append((chunk.first, chunk.first + chunk.size_bytes))
    return {file: merged(stretches) for file, stretches in found.items()}


def parts_of(ranges: Iterable[Stretch], part_bytes: int, *, gap: int = 0) -> list[Stretch]:
    """Return the numbers of the parts that contain these bytes.

    Args:
        ranges: of bytes.
        part_bytes: size of a part.
        gap: so many parts between two stretches are taken along, which saves a request.
    """
    return merged(((first // part_bytes, -(-end // part_bytes)) for first, end in ranges if end > first), gap)


def merged(stretches: Iterable[Stretch], gap: int = 0) -> list[Stretch]:
    """Return stretches in ascending order, and one for those that touch or have at most ``gap`` between them."""
    found: list[Stretch] = []
    for first, end in sorted(stretches):
        if found and first <= found[-1][1] + gap:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((first, end))
    return found


def without(stretches: Iterable[Stretch], have: Iterable[Stretch]) -> list[Stretch]:
    """Return what of the stretches is not in ``have``."""
    missing = merged(stretches)
    for first, end in have:
        missing = [
            piece
            for begin, stop in missing
            for piece in ((begin, min(stop, first)), (max(begin, end), stop))
            if piece[0] < piece[1]
        ]
    return merged(missing)


def length(stretches: Iterable[Stretch]) -> int:
    """Return how many numbers disjoint stretches have together."""
    return sum(end - first for first, end in stretches)


def _overlap(one: Stretch, other: Stretch) -> bool:
    return one[0] < other[1] and other[0] < one[1]
