"""Copies of one save that are made beside the next forward and backward, and what proves that they are of one step.

A tensor that `LiveTensors` knows is only remembered at the save: where it is, how often it was written to (``_version``), and
some of its values. The writer thread copies it, piece by piece; whoever wants to change it waits for the rest, or rather copies
it (`LaterCopies.finish`). Then the training thread looks at the counts once more (`LaterCopies.confirm`): a write that began
before the copy was made is counted by then. If a tensor was written to, the save has failed, and is never committed.

The pieces are checked for NaN and infinity while they are in the processor's cache.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch

_PIECE_BYTES = 8 << 20  # so many that Python's lock is no matter, and few enough for the cache and for a short wait
_SAMPLED = 64  # values of a tensor that are compared
_CHECKED = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2)
_WITHOUT_INFINITY = {torch.float8_e4m3fn: 0x7F}  # the numbers that stand for NaN, read as whole ones

_Piece = tuple["_LaterCopy", int, int]  # from a byte to a byte


class LaterCopies:
    """The copies of one save. `run` is for the writer thread, `confirm` for the training thread, `finish` for any."""

    def __init__(self) -> None:
        self._changing = threading.Condition()
        self._copies: list[_LaterCopy] = []
        self._addresses: set[int] = set()
        self._pieces: list[_Piece] = []
        self._next = 0
        self._under_way = 0
        self._is_hurried = False
        self._unchecked: list[_Piece] = []
        self._made: list[tuple[int, torch.Tensor, torch.dtype]] = []
        self._error: BaseException | None = None
        self._confirmed = threading.Event()
        self._checked = threading.Event()
        self.written_to: list[int] = []  # addresses of tensors, after `confirm`
        self.not_finite: list[int] = []  # ... with a number that is not finite, after `checked`
        self.unknown: list[int] = []  # ... of which nobody can tell

    def __len__(self) -> int:
        return len(self._copies)

    def add(self, tensor: torch.Tensor, target: torch.Tensor) -> None:
        """Remember a tensor. Its copy is complete after `finish`.

        Args:
            tensor: contiguous, on the CPU.
            target: memory for the copy: one-dimensional, uint8, of the same size.
        """
        one = _LaterCopy(tensor, target)
        with self._changing:
            self._copies.append(one)
            self._addresses.add(one.address)
            self._pieces.extend(one.pieces())

    def add_made(self, address: int, copy: torch.Tensor, dtype: torch.dtype) -> None:
        """Have a copy that is already made checked for NaN.

        Args:
            address: of the tensor itself.
            copy: its bytes: one-dimensional, uint8.
            dtype: what they are.
        """
        self._made.append((address, copy, dtype))

    def holds(self, address: int) -> bool:
        """Return whether the tensor at an address is copied later."""
        return address in self._addresses

    @property
    def storages(self) -> frozenset[int]:
        """Return the addresses of the memory that is copied later."""
        return frozenset(one.storage for one in self._copies)

    # -- copying ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Copy everything, and check it for NaN: while it is copied, or after that if somebody waits for the copies.

        Raises whatever was raised while a tensor was copied, in any thread.
        """
        try:
            while (piece := self._take()) is not None:
                self._copy(piece)
                if not self._is_hurried:
                    self._check(piece)
                else:
                    self._unchecked.append(piece)
            self._wait()
            if self._error is not None:
                raise self._error
            for piece in self._unchecked:
                self._check(piece)
            for address, copy, dtype in self._made:
                self._note(address, copy, dtype)
        finally:
            self._checked.set()

    def finish(self) -> None:
        """Return when everything is copied. What nobody copies yet is copied by this thread, and checked by `run`."""
        self._is_hurried = True
        while (piece := self._take()) is not None:
            self._copy(piece)
            self._unchecked.append(piece)
        self._wait()

    def _take(self) -> _Piece | None:
        with self._changing:
            if self._next == len(self._pieces):
                return None
            self._next += 1
            self._under_way += 1
            return self._pieces[self._next - 1]

    def _copy(self, piece: _Piece) -> None:
        one, begin, end = piece
        try:
            one.copy(begin, end)
        except BaseException as error:  # `run` raises it: the save fails, and not the training
            self._error = error
            if not isinstance(error, Exception):  # Ctrl-C
                raise
        finally:
            with self._changing:
                self._under_way -= 1
                self._changing.notify_all()

    def _wait(self) -> None:
        with self._changing:
            self._changing.wait_for(lambda: not self._under_way)

    # -- whether the copies are good ----------------------------------------------------------------------------------

    def confirm(self) -> None:
        """Find out which tensors were written to since the save, and let go of all. Call it after `finish`."""
        with self._changing:
            if not self._confirmed.is_set():
                self.written_to = [one.address for one in self._copies if one.was_written_to()]
                for one in self._copies:
                    one.release()
                self._confirmed.set()

    def is_confirmed(self, timeout_s: float = 0.0) -> bool:
        """Return whether `confirm` was called, or is within ``timeout_s`` seconds."""
        return self._confirmed.wait(timeout_s) if timeout_s else self._confirmed.is_set()

    def is_checked(self, timeout_s: float = 0.0) -> bool:
        """Return whether all copies were checked for NaN, or are within ``timeout_s`` seconds."""
        return self._checked.wait(timeout_s) if timeout_s else self._checked.is_set()

    def _check(self, piece: _Piece) -> None:
        one, begin, end = piece
        if one.address not in self.not_finite:
            self._note(one.address, one.target[begin:end], one.dtype)

    def _note(self, address: int, copy: torch.Tensor, dtype: torch.dtype) -> None:
        finite = are_finite(copy, dtype)
        if finite is None and address not in self.unknown:
            self.unknown.append(address)
        elif finite is False:
            self.not_finite.append(address)


class _LaterCopy:
    """One tensor and its copy. The parameters are those of `LaterCopies.add`."""

    def __init__(self, tensor: torch.Tensor, target: torch.Tensor) -> None:
        self.address = tensor.data_ptr()
        self.storage = tensor.untyped_storage().data_ptr()
        self.dtype = tensor.dtype
        self.target = target
        # The same memory, and the same count of writes, whatever becomes of the parameter.
        self._tensor: torch.Tensor | None = tensor.detach()
        self._version = self._tensor._version
        self._size = target.numel()
        self._left = self._size
        self._counting = threading.Lock()
        self._sampled = self._sample()
        self._values_differ = False

    def pieces(self) -> Iterator[_Piece]:
        """Yield its pieces."""
        for begin in range(0, self._size, _PIECE_BYTES):
            yield self, begin, min(begin + _PIECE_BYTES, self._size)

    def _sample(self) -> torch.Tensor:
        assert self._tensor is not None
        return self._tensor.as_strided((_SAMPLED,), (self._tensor.numel() // _SAMPLED,)).clone()

    def copy(self, begin: int, end: int) -> None:
        """Copy these bytes while other threads work; after the last ones, compare some values with those at the save."""
        ctypes.memmove(self.target.data_ptr() + begin, self.address + begin, end - begin)
        with self._counting:
            self._left -= end - begin
        if not self._left:
            self._values_differ = not torch.equal(self._sample().view(torch.uint8), self._sampled.view(torch.uint8))

    def was_written_to(self) -> bool:
        """Return whether it was written to since the save; afterwards nobody can tell what was copied."""
        assert self._tensor is not None
        return self._values_differ or self._tensor._version != self._version

    def release(self) -> None:
        """Let go of the tensor's memory."""
        self._tensor = None


def are_finite(data: torch.Tensor, dtype: torch.dtype) -> bool | None:
    """Return whether all numbers are finite; None if it is unknown how such numbers look. It works in this thread alone.

    The exponent of a number that is not finite is all ones. So it is the largest one of its sign, read as a whole number.

    Args:
        data: their bytes: one-dimensional, uint8, on the CPU.
        dtype: what they are.
    """
    if not (dtype.is_floating_point or dtype.is_complex) or not data.numel():
        return True
    limits = _limits(dtype)
    if limits is None:
        return None
    signed, most, unsigned, most_unsigned = limits
    numbers = data.numpy()
    return int(numbers.view(signed).max()) <= most and int(numbers.view(unsigned).max()) <= most_unsigned


@lru_cache
def _limits(dtype: torch.dtype) -> tuple[str, int, str, int] | None:
    """Return how to read numbers as signed and unsigned whole ones, each with the largest that is finite."""
    real = dtype.to_real() if dtype.is_complex else dtype
    if real not in _CHECKED and real not in _WITHOUT_INFINITY:
        return None
    unsigned = f"u{real.itemsize}"
    infinity: Any = torch.full((1,), torch.inf).to(real).view(torch.uint8).numpy().view(unsigned)
    first = _WITHOUT_INFINITY.get(real, int(infinity[0]))
    return f"i{real.itemsize}", first - 1, unsigned, first - 1 + (1 << (8 * real.itemsize - 1))
