"""Exchange of numbers between the processes of one machine, in shared memory.

It takes microseconds and needs no other thread; a collective on the CPU takes hundreds of microseconds if the cores are busy.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

_SHARED_MEMORY = Path("/dev/shm")
_LINE_BYTES = 128  # a slot shares no cache line with another slot, nor the adjacent line that is prefetched
_SPIN_S = 100e-6
_FIRST_SLEEP_S, _LONGEST_SLEEP_S = 20e-6, 2e-3
_LOOK_FOR_THE_DEAD_S = 0.2


class Gone(RuntimeError):
    """A process that others wait for has ended, or has closed the board."""


class Board:
    """Lets each of ``ranks`` processes show its numbers, round by round, and read the maximum of all.

    A round's numbers include a checksum, so that the order in which writes become visible does not matter. Two slots per
    rank are enough: no process begins the round after next before all have read this one. A process is alive as long as it
    holds a lock on its byte of the file, which the kernel releases however the process ends. All must open the board before
    one of them waits for another.

    Args:
        path: a file from `create`.
        rank: number of this process, from 0.
        ranks: number of processes.
        values: number of values that each process shows.

    Raises:
        OSError: the file does not exist here (another machine or container), or can't be mapped.
    """

    def __init__(self, path: Path, rank: int, ranks: int, values: int) -> None:
        self._record = struct.Struct(f"=Q{values}d")
        self._check = struct.Struct("=I")
        self._rank, self._ranks = rank, ranks
        self._round = 0
        self._file = path.open("r+b", buffering=0)
        try:
            self._memory = mmap.mmap(self._file.fileno(), _size_bytes(ranks))
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)  # closing any descriptor of the file releases it
        except (OSError, ValueError) as error:
            self._file.close()
            raise OSError(f"{path} can't be shared: {error}") from error

    @staticmethod
    def create(ranks: int) -> Path | None:
        """Create the file of a board in shared memory; return None if there is no room.

        The caller must remove it after all processes have tried to open it.
        """
        path = _SHARED_MEMORY / f"hf_spot-{secrets.token_hex(8)}"
        try:
            with path.open("xb") as file:
                os.fchmod(file.fileno(), 0o600)
                # Writing to a mapped hole of a file is a bus error if there is no room.
                os.posix_fallocate(file.fileno(), 0, _size_bytes(ranks))
        except (OSError, AttributeError):  # AttributeError: this system lacks the function
            path.unlink(missing_ok=True)
            return None
        return path

    def show(self, *values: float) -> None:
        """Begin a round with these numbers. The previous round must have been read by `largest`."""
        self._round += 1
        record = self._record.pack(self._round, *values)
        at = self._at(self._rank)
        self._memory[at : at + self._record.size + self._check.size] = record + self._check.pack(zlib.crc32(record))

    def largest(self, patience_s: float) -> tuple[float, ...]:
        """Wait until all have shown their numbers of this round; return the maximum of each number.

        Raises:
            Gone: a process has ended without showing its numbers, or has shown none for ``patience_s`` seconds.
        """
        found = []
        for rank in range(self._ranks):
            shown = self._read(rank)
            found.append(self._wait_for(rank, patience_s) if shown is None else shown)
        return tuple(map(max, *found)) if self._ranks > 1 else found[0]

    def close(self) -> None:
        """Close the board. Processes that wait for this one get `Gone`."""
        self._memory.close()
        self._file.close()

    def _at(self, rank: int) -> int:
        return _LINE_BYTES * (2 * rank + self._round % 2)

    def _read(self, rank: int) -> tuple[float, ...] | None:
        at = self._at(rank)
        number, *values = self._record.unpack_from(self._memory, at)
        if number != self._round:
            return None
        check = self._check.unpack_from(self._memory, at + self._record.size)[0]
        # The memory may change between two reads: packing the values again checks exactly what was read.
        return tuple(values) if zlib.crc32(self._record.pack(number, *values)) == check else None

    def _wait_for(self, rank: int, patience_s: float) -> tuple[float, ...]:
        began = looked = time.monotonic()
        sleep_s = _FIRST_SLEEP_S
        while (shown := self._read(rank)) is None:
            now = time.monotonic()
            if now - began < _SPIN_S:
                os.sched_yield()
                continue
            if now - looked > _LOOK_FOR_THE_DEAD_S:
                looked = now
                if not self._lives(rank) and self._read(rank) is None:
                    raise Gone(f"rank {rank} has ended")
                if now - began > patience_s:
                    raise Gone(f"rank {rank} has not responded for {patience_s:.0f} s")
            time.sleep(sleep_s)
            sleep_s = min(2 * sleep_s, _LONGEST_SLEEP_S)
        return shown

    def _lives(self, rank: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except OSError:
            return True
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, rank)
        return False


def open_together(
    rank: int,
    ranks: int,
    values: int,
    from_main: Callable[[Callable[[], Path | None]], Path | None],
    gather: Callable[[bool], list[bool]],
) -> Board | None:
    """Open one board on all ranks; return None on all if one of them can't open it. All ranks must call it.

    Args:
        rank: number of this process.
        ranks: number of ranks.
        values: number of values that each rank shows.
        from_main: calls a function on rank 0, and returns its result on all ranks.
        gather: returns the values of all ranks.
    """
    path = from_main(lambda: Board.create(ranks))
    if path is None:
        return None
    board = None
    with contextlib.suppress(OSError):
        board = Board(path, rank, ranks, values)
    everywhere = all(gather(board is not None))
    if rank == 0:
        path.unlink(missing_ok=True)
    if not everywhere and board is not None:
        board.close()
    return board if everywhere else None


def _size_bytes(ranks: int) -> int:
    return 2 * _LINE_BYTES * ranks
