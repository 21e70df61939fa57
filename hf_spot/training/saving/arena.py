"""Memory for the copies of a save: reserved once, used again, given back."""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path

import psutil
import torch

from hf_spot.training.saving.device import Arrivals, Pins, in_order

_ALIGNMENT = 64


def free_bytes() -> int:
    """Memory that this process may still take: what the machine has, or what the container's limit leaves."""
    left = [psutil.virtual_memory().available]
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or no limit ("max")
        left.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, min(left))


class Arena:
    """Memory that holds the copies of one checkpoint, and is used again for the next.

    Address space for ``limit_bytes`` is reserved once; memory is taken where it is written, and given back by `close`.

    Args:
        limit_bytes: that the copies may take together.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._memory: mmap.mmap | None = None
        self._address = 0
        self._used = 0
        self._pins: Pins | None = None
        self._arrivals = Arrivals()

    def clear(self) -> None:
        """Forgets the copies. Nobody may be reading them any more."""
        self._used = 0
        self._arrivals.clear()

    def copy(self, source: torch.Tensor) -> torch.Tensor | None:
        """A copy of these bytes, which may be read after `wait`; or None when there is no room for it.

        Args:
            source: one-dimensional, uint8, wherever it is.
        """
        count = source.numel()
        if count == 0:
            return source.cpu().clone()
        begin = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        if begin + count > self.limit_bytes or not self._reserved():
            return None
        self._used = begin + count
        target = torch.frombuffer(self._memory, dtype=torch.uint8, offset=begin, count=count)
        if in_order(source.device):
            self._arrivals.expect(source, target, begin)
            return target
        return target.copy_(source)

    def holds(self, address: int) -> bool:
        """Whether a copy begins there."""
        return self._address <= address < self._address + self._used

    def wait(self) -> None:
        """Returns when all copies are whole."""
        self._arrivals.wait()

    def touch(self, count: int) -> None:
        """Takes the memory for so many bytes: the first copy into memory that is fresh is three times as slow."""
        if self._reserved():
            count = max(1, min(count, self.limit_bytes))
            torch.frombuffer(self._memory, dtype=torch.uint8, count=count).zero_()
            self.pin(count)

    def pin(self, count: int | None = None) -> None:
        """Makes copies from a GPU into the first ``count`` bytes fast; None for those in use. For the thread that writes."""
        if self._pins is not None:
            self._pins.reach(self._used if count is None else count)

    def _reserved(self) -> bool:
        if self._memory is None and self.limit_bytes:
            try:
                self._memory = mmap.mmap(-1, self.limit_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except (OSError, ValueError, OverflowError):
                self.limit_bytes = 0
                return False
            if hasattr(mmap, "MADV_DONTFORK"):  # DataLoader workers would share it, and have it copied page by page
                self._memory.madvise(mmap.MADV_DONTFORK)
            self._address = torch.frombuffer(self._memory, dtype=torch.uint8, count=1).data_ptr()
            self._pins = Pins(self._address, self.limit_bytes)
        return self._memory is not None

    def close(self) -> None:
        """Gives the memory back, as soon as the last copy is gone."""
        if self._pins is not None:
            with contextlib.suppress(RuntimeError):  # of a device that has failed
                self.wait()
            self._pins.close()
        self._memory = self._pins = None
        self.limit_bytes = 0
