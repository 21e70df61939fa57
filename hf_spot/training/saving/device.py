"""Copies from a device (a GPU) to the memory of a save.

They are queued on the stream that the training itself uses: after all work that produces the state, and before any that changes
it again. So no copy sees a later step, and the training thread waits for none. Pinned memory makes them fast: the device writes
to it directly, at the speed of the bus.

Source: https://docs.nvidia.com/cuda/cuda-runtime-api/api-sync-behavior.html.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import safetensors.torch
import torch

from hf_spot.training.upstream import STORAGE_CPU, TO_NDARRAY

log = logging.getLogger("hf_spot")

_PIECE_BYTES = 64 << 20  # bytes that are pinned at a time; a copy must not cross from one piece into the next
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device of this process


class Pins:
    """Pins memory from its start, as far as it is used. If the driver refuses, the rest stays unpinned.

    Args:
        address: address of the memory, at the start of a page.
        size_bytes: size of the memory.
    """

    def __init__(self, address: int, size_bytes: int) -> None:
        self._address = address
        self._size_bytes = size_bytes
        self._pinned: list[int] = []
        self._refused = False

    def reach(self, end: int) -> None:
        """Pin the memory up to ``end``, in bytes from its start. No copy may be under way.

        Don't call it in the training thread: a CUDA error stays with the thread that caused it, and would be raised by its next
        operation.
        """
        while _in_use() and not self._refused and (begin := len(self._pinned) * _PIECE_BYTES) < end:
            address, size = self._address + begin, min(_PIECE_BYTES, self._size_bytes - begin)
            self._refused = not _succeeded("cudaHostRegister", address, size, _PORTABLE)
            if not self._refused:
                self._pinned.append(address)

    def close(self) -> None:
        """Unpin the memory. No copy may be under way."""
        while self._pinned:
            _succeeded("cudaHostUnregister", self._pinned.pop())
        self._refused = True


def _in_use() -> bool:
    in_use: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return in_use


def _succeeded(name: str, *arguments: int) -> bool:
    code = int(getattr(torch.cuda.cudart(), name)(*arguments))  # type: ignore[no-untyped-call]
    if code:
        log.info("%s returned %d: saves copy from the GPU without pinned memory", name, code)
    return code == 0


class Arrivals:
    """Starts the copies of one save, and waits for them."""

    def __init__(self) -> None:
        self._last: dict[int, torch.Event] = {}

    def expect(self, source: torch.Tensor, target: torch.Tensor, begin: int) -> None:
        """Queue a copy. The target is complete after `wait`.

        Args:
            source: one-dimensional, uint8, on a device for which `in_order` holds.
            target: tensor of the same size in CPU memory.
            begin: offset of the target in bytes from the start of the pinned memory.
        """
        count, at = source.numel(), 0
        while at < count:
            end = min(count, at + _PIECE_BYTES - (begin + at) % _PIECE_BYTES)
            target[at:end].copy_(source[at:end], non_blocking=True)
            at = end
        self._last[source.device.index or 0] = torch.accelerator.current_stream(source.device).record_event()

    def wait(self) -> None:
        """Wait until all copies have arrived. Any thread may call it."""
        for event in list(self._last.values()):
            event.synchronize()

    def clear(self) -> None:
        """Forget the copies, before the next save."""
        self._last.clear()


def in_order(device: torch.device) -> bool:
    """Return whether this device executes its work, including copies to the CPU, in the order of one current stream."""
    if device.type in ("cpu", "meta", "mps"):  # mps uses a separate queue for copies
        return False
    accelerator = torch.accelerator.current_accelerator()
    return accelerator is not None and accelerator.type == device.type


@contextmanager
def taken_over(take: Callable[[Any, int, int], torch.Tensor | None]) -> Iterator[None]:
    """Use ``take`` within the block for this thread's copies from a device to the CPU by ``torch.save`` and safetensors.

    Verified with torch 2.13 and safetensors 0.8.

    Args:
        take: copies bytes of an untyped storage, given offset and count; returns None to let the library copy.
    """
    thread = threading.get_ident()

    def make_cpu(plain: Any) -> Callable[[torch.UntypedStorage], Any]:
        def cpu(storage: torch.UntypedStorage) -> Any:
            if threading.get_ident() == thread and in_order(storage.device) and storage.nbytes():
                copy = take(storage, 0, storage.nbytes())
                if copy is not None:
                    return copy.untyped_storage()
            return plain(storage)

        return cpu

    def make_to_ndarray(plain: Any) -> Callable[[torch.Tensor], Any]:
        def to_ndarray(tensor: torch.Tensor) -> Any:
            if threading.get_ident() == thread and in_order(tensor.device) and tensor.nbytes:
                copy = take(tensor.untyped_storage(), int(tensor.storage_offset()) * tensor.itemsize, tensor.nbytes)
                if copy is not None:
                    tensor = torch.empty(0, dtype=tensor.dtype).set_(copy.untyped_storage(), 0, tensor.shape, tensor.stride())
            return plain(tensor)

        return to_ndarray

    with STORAGE_CPU.replaced(torch.UntypedStorage, make_cpu), TO_NDARRAY.replaced(safetensors.torch, make_to_ndarray):
        yield
