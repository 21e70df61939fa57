"""Memory for the copies of a save: reserved once, reused, released at the end."""

from __future__ import annotations

import contextlib
import mmap

import torch

from hf_spot.free_memory import available_and_total_bytes
from hf_spot.training.saving.device import Arrivals, Pins, in_order

_ALIGNMENT = 64


def free_bytes() -> int:
    """Return the bytes that this process may still allocate, limited by the machine and the container."""
    return available_and_total_bytes()[0]


class Arena:
    """Memory that holds the copies of one checkpoint, and is reused for the next one.

    Address space for ``limit_bytes`` is reserved once; the system allocates memory as it is written, and `close` releases it.

    Args:
        limit_bytes: most bytes that the copies may use together.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._memory: mmap.mmap | None = None
        self._address = 0
        self._used = 0
        self._pins: Pins | None = None
        self._arrivals = Arrivals()

    def clear(self) -> None:
        """Discard the copies. They must no longer be in use."""
        self._used = 0
        self._arrivals.clear()

    def copy(self, source: torch.Tensor) -> torch.Tensor | None:
        """Return a copy of these bytes, complete after `wait`; None if there is no room for it.

        Args:
            source: one-dimensional, uint8, on any device.
        """
        count = source.numel()
        if count == 0:
            return source.cpu().clone()
        target = self.reserve(count)
        if target is not None and in_order(source.device):
            self._arrivals.expect(source, target, self._used - count)
            return target
        return None if target is None else target.copy_(source)

    def reserve(self, count: int) -> torch.Tensor | None:
        """Return memory for a copy of ``count`` bytes, at least 1; None if there is no room for it."""
        begin = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        if begin + count > self.limit_bytes or not self._reserved():
            return None
        self._used = begin + count
        return torch.frombuffer(self._memory, dtype=torch.uint8, offset=begin, count=count)

    def holds(self, address: int) -> bool:
        """Return whether an address lies in the copies."""
        return self._address <= address < self._address + self._used

    def wait(self) -> None:
        """Wait until all copies are complete."""
        self._arrivals.wait()

    def touch(self, count: int) -> None:
        """Allocate and pin memory for ``count`` bytes in advance: the first copy into fresh memory is three times as slow."""
        if self._reserved():
            count = max(1, min(count, self.limit_bytes))
            torch.frombuffer(self._memory, dtype=torch.uint8, count=count).zero_()
            self.pin(count)

    def pin(self, count: int | None = None) -> None:
        """Pin the first ``count`` bytes, or those in use, so that copies from a GPU are fast. Call it in the writer thread."""
        if self._pins is not None:
            self._pins.reach(self._used if count is None else count)

    def _reserved(self) -> bool:
        if self._memory is None and self.limit_bytes:
            try:
                self._memory = mmap.mmap(-1, self.limit_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except (OSError, ValueError, OverflowError):
                self.limit_bytes = 0
                return False
            if hasattr(mmap, "MADV_DONTFORK"):  # forked DataLoader workers would share it, and each write would copy a page
                self._memory.madvise(mmap.MADV_DONTFORK)
            self._address = torch.frombuffer(self._memory, dtype=torch.uint8, count=1).data_ptr()
            self._pins = Pins(self._address, self.limit_bytes)
        return self._memory is not None

    def close(self) -> None:
        """Release the memory, as soon as the last copy is deleted."""
        if self._pins is not None:
            with contextlib.suppress(RuntimeError):  # the device has failed
                self.wait()
            self._pins.close()
        self._memory = self._pins = None
        self.limit_bytes = 0
