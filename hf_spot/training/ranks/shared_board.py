"""Numbers that the processes of one machine show one another in memory that they share.

That takes microseconds, and needs no other thread to run: a collective on the CPU takes hundreds where the cores are busy.
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
_LINE_BYTES = 128  # a slot shares no cache line with another, nor with the one that is fetched beside it
_SPIN_S = 100e-6
_FIRST_SLEEP_S, _LONGEST_SLEEP_S = 20e-6, 2e-3
_LOOK_FOR_THE_DEAD_S = 0.2


class Gone(RuntimeError):
    """A process has ended, or left, that the others wait for."""


class Board:
    """Each of ``ranks`` processes shows its numbers, round after round, and reads the largest of all.

    A round's numbers carry their own checksum, so that it does not matter in which order a processor lets others see what was
    written. Two slots per rank are enough: nobody begins the round after next before all have read this one. That a process
    lives is told by its lock on a byte of the file, which the kernel takes back when it ends, however it ends: all must have
    opened the board before one of them waits for another.

    Args:
        path: a file that `create` made.
        rank: of this process, from 0.
        ranks: how many there are.
        values: numbers that each shows.

    Raises:
        OSError: the file is not there (another machine, another container), or can't be mapped.
    """

    def __init__(self, path: Path, rank: int, ranks: int, values: int) -> None:
        self._record = struct.Struct(f"=Q{values}d")
        self._check = struct.Struct("=I")
        self._rank, self._ranks = rank, ranks
        self._round = 0
        self._file = path.open("r+b", buffering=0)
        try:
            self._memory = mmap.mmap(self._file.fileno(), _size_bytes(ranks))
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)  # gone with the first descriptor that is closed
        except (OSError, ValueError) as error:
            self._file.close()
            raise OSError(f"{path} can't be shared: {error}") from error

    @staticmethod
    def create(ranks: int) -> Path | None:
        """Makes the file of a board, in memory; None where the machine has no room for it.

        Who made it removes it when all have opened it, or could not.
        """
        path = _SHARED_MEMORY / f"hf_spot-{secrets.token_hex(8)}"
        try:
            with path.open("xb") as file:
                os.fchmod(file.fileno(), 0o600)
                # Memory over a hole of a file that finds no room later is a bus error.
                os.posix_fallocate(file.fileno(), 0, _size_bytes(ranks))
        except (OSError, AttributeError):  # AttributeError: not on this system
            path.unlink(missing_ok=True)
            return None
        return path

    def show(self, *values: float) -> None:
        """Begins a round with these numbers. The one before must have been read by `largest`."""
        self._round += 1
        record = self._record.pack(self._round, *values)
        at = self._at(self._rank)
        self._memory[at : at + self._record.size + self._check.size] = record + self._check.pack(zlib.crc32(record))

    def largest(self, patience_s: float) -> tuple[float, ...]:
        """Element by element the largest number of this round, when all have shown theirs.

        Raises:
            Gone: a process has ended without showing them, or shows nothing for ``patience_s`` seconds.
        """
        found = []
        for rank in range(self._ranks):
            shown = self._read(rank)
            found.append(self._wait_for(rank, patience_s) if shown is None else shown)
        return tuple(map(max, *found)) if self._ranks > 1 else found[0]

    def close(self) -> None:
        """Leaves. Who still waits for this process learns that it is gone."""
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
        # What was read and what was checked may differ while it is being written: packed again, it is one thing.
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
                    raise Gone(f"rank {rank} has said nothing for {patience_s:.0f} s")
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
    """Called by all ranks: a board for all of them, or None for all when one of them can't reach it.

    Args:
        rank: of this process.
        ranks: how many there are.
        values: numbers that each shows.
        from_main: lets rank 0 act, and gives its result to all.
        gather: what every rank brings.
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
