"""The states of a process's random generators: captured, restored, and serialized without pickle."""

from __future__ import annotations

import ctypes
import random
import struct
from collections.abc import Callable
from typing import Any

import numpy.random
import torch

from hf_spot.training.upstream import NUMPY_BITS, NUMPY_RANDOM

_PYTHON = struct.Struct("<i625I?d")
_NUMPY = struct.Struct("<624Ii?d")
_WINDOW_BYTES = 64  # of a Mersenne Twister: its position among its 624 numbers, and 15 of these


def capture() -> dict[str, Any]:
    """Return the states of Python's, numpy's and torch's CPU generators.

    Takes 2 microseconds, and 7 and 30 more if Python's and numpy's have changed since the last call.
    """
    return {"python": _python.get(), "numpy": _numpy.get(), "torch": torch.default_generator.get_state()}


class _Kept:
    """Caches the state of a generator until it changes, so that steps that draw nothing from it stay fast.

    In steps of 4.5 ms of a Trainer on the CPU, `capture` took 24 microseconds with this cache and 134 without it (medians; 17
    and 56 at the fastest): 2 % of the step. In steps of 0.8 ms it was 5 %.

    A change is detected in the generator's own memory: each draw moves the position, and when all numbers are used, or a seed
    is set, all are replaced. Comparing all of them would take longer, because they are rarely in the processor's cache. The
    state also includes the second of a pair of normal numbers, kept for the next call: such a state is never cached.

    The check in each step touches few objects, which are rarely in the processor's cache either.

    Args:
        owner: owner of the generator.
        generator_of: returns the owner's current generator.
        address: returns the address of the window in a generator; None if unknown: then the state is read each time.
        read: returns the state.
        holds_normal: returns whether a state includes a kept normal number.
    """

    __slots__ = ("_address", "_generator", "_generator_of", "_holds_normal", "_memory", "_owner", "_read", "_seen", "_state")

    def __init__(
        self,
        owner: Any,
        generator_of: Callable[[Any], Any],
        address: Callable[[Any], int | None],
        read: Callable[[], Any],
        holds_normal: Callable[[Any], bool],
    ) -> None:
        self._owner = owner
        self._generator_of = generator_of
        self._address = address
        self._read = read
        self._holds_normal = holds_normal
        self._generator: Any = None
        self._memory: Any = None
        self._seen = b""
        self._state: Any = None

    def get(self) -> Any:
        if self._state is None or self._memory.raw != self._seen or self._generator_of(self._owner) is not self._generator:
            return self._read_anew()
        return self._state

    def _read_anew(self) -> Any:
        generator = self._generator_of(self._owner)
        if generator is not self._generator:
            self._generator, address = generator, self._address(generator)
            self._memory = None if address is None else (ctypes.c_char * _WINDOW_BYTES).from_address(address)
        self._seen, state = b"" if self._memory is None else self._memory.raw, self._read()
        self._state = None if self._memory is None or self._holds_normal(state) else state
        return state

    def forget(self) -> None:
        """Drop the cached state after the state was set: the window alone may look unchanged."""
        self._state = None


def _address_in_python(generator: random.Random) -> int | None:
    """Return the address of the state behind CPython's object header, after verifying its contents; None if it differs."""
    layout, address = struct.Struct("@i624I"), id(generator) + object.__basicsize__
    if type(generator).__basicsize__ < object.__basicsize__ + layout.size:
        return None
    position, *numbers = layout.unpack(ctypes.string_at(address, layout.size))
    return address if (*numbers, position) == generator.getstate()[1] else None


def _address_in_numpy(generator: Any) -> int | None:
    """Return the address of the window, which ends with the position after the numbers; None for other generators."""
    if not isinstance(generator, numpy.random.MT19937):
        return None
    return int(generator.ctypes.state_address) + struct.calcsize("@624Ii") - _WINDOW_BYTES


_python = _Kept(
    random.getstate.__self__,  # type: ignore[attr-defined]
    lambda owner: owner,
    _address_in_python,
    random.getstate,
    lambda state: state[2] is not None,
)
_numpy = _Kept(
    NUMPY_RANDOM.find(),
    NUMPY_BITS.of if NUMPY_BITS.find() is not None else lambda owner: None,  # then the state is read each time
    _address_in_numpy,
    numpy.random.get_state,
    lambda state: bool(state[3]),
)


def forget() -> None:
    """Drop cached states. Call it after other code has set generators."""
    _python.forget()
    _numpy.forget()


def capture_gpus() -> dict[str, Any]:
    """Return the states of the GPUs' generators, to be merged with `capture`'s."""
    return {"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {}


def restore(state: dict[str, Any]) -> None:
    """Restore states from `capture`, and from `capture_gpus` if they are included."""
    forget()
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


def pack(state: dict[str, Any]) -> bytes:
    """Return the states of the CPU generators as bytes of constant length."""
    version, internal, gauss = state["python"]
    _, keys, position, has_gauss, cached = state["numpy"]
    python = _PYTHON.pack(version, *internal, gauss is not None, gauss or 0.0)
    torch_state: bytes = state["torch"].numpy().tobytes()
    return python + _NUMPY.pack(*keys.tolist(), position, bool(has_gauss), cached) + torch_state


def unpack(data: bytes) -> dict[str, Any]:
    """Return the states that `pack` was given. Raises struct.error if there are too few bytes."""
    version, *internal, has_gauss, gauss = _PYTHON.unpack_from(data)
    *keys, position, has_cached, cached = _NUMPY.unpack_from(data, _PYTHON.size)
    return {
        "python": (version, tuple(internal), gauss if has_gauss else None),
        "numpy": ("MT19937", numpy.array(keys, dtype=numpy.uint32), position, int(has_cached), cached),
        "torch": torch.frombuffer(bytearray(data[_PYTHON.size + _NUMPY.size :]), dtype=torch.uint8),
    }


def states_of(generators: list[torch.Generator]) -> list[torch.Tensor]:
    """Return the states of generators."""
    return [generator.get_state() for generator in generators]


def set_states(generators: list[torch.Generator], states: list[torch.Tensor]) -> None:
    """Restore the states that `states_of` returned."""
    for generator, state in zip(generators, states, strict=False):
        generator.set_state(state)
