"""The random generators of a process as values: taken, set, and written down without pickle."""

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
_WINDOW_BYTES = 64  # of a Mersenne Twister: where it stands among its 624 numbers, and 15 of these


def capture() -> dict[str, Any]:
    """Python's, numpy's and torch's on the CPU: 2 microseconds, and 7 and 30 more when Python's and numpy's have changed since
    the last time."""
    return {"python": _python.get(), "numpy": _numpy.get(), "torch": torch.default_generator.get_state()}


class _Kept:
    """The state of a generator, kept until it changes: a step that draws nothing of it need not pay for handing it out.

    Whether it has changed is seen in the generator's own memory: each draw moves its position, and when all numbers are used,
    or a seed is set, all are replaced. To look at all of them would take longer, as they are seldom in the processor's cache.
    Beside the numbers there is one more, the second of a pair of normal ones that is kept for the next call: a state that holds
    one is always read anew.

    What is asked in every step touches few objects: they, too, are seldom in the cache.

    Args:
        owner: of the generator.
        generator_of: gives the generator that it has now.
        address: of the window there; None when it can't be told, and the state is read each time.
        read: hands out the state.
        holds_normal: whether a state holds such a number.
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
        """Somebody has set the state: that it looks the same is not enough."""
        self._state = None


def _address_in_python(generator: random.Random) -> int | None:
    """CPython has position and numbers behind the head of the object: looked at before it is believed."""
    layout, address = struct.Struct("@i624I"), id(generator) + object.__basicsize__
    if type(generator).__basicsize__ < object.__basicsize__ + layout.size:
        return None
    position, *numbers = layout.unpack(ctypes.string_at(address, layout.size))
    return address if (*numbers, position) == generator.getstate()[1] else None


def _address_in_numpy(generator: Any) -> int | None:
    """numpy has the position behind the numbers, and tells where."""
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
    NUMPY_BITS.of if NUMPY_BITS.find() is not None else lambda owner: None,  # then it is read each time
    _address_in_numpy,
    numpy.random.get_state,
    lambda state: bool(state[3]),
)


def forget() -> None:
    """Called when generators have been set by somebody else's code."""
    _python.forget()
    _numpy.forget()


def capture_gpus() -> dict[str, Any]:
    """Those of the GPUs, to be joined to `capture`'s."""
    return {"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {}


def restore(state: dict[str, Any]) -> None:
    """Sets what `capture` took."""
    forget()
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


def pack(state: dict[str, Any]) -> bytes:
    """The generators of the CPU as bytes, always as many."""
    version, internal, gauss = state["python"]
    _, keys, position, has_gauss, cached = state["numpy"]
    python = _PYTHON.pack(version, *internal, gauss is not None, gauss or 0.0)
    torch_state: bytes = state["torch"].numpy().tobytes()
    return python + _NUMPY.pack(*keys.tolist(), position, bool(has_gauss), cached) + torch_state


def unpack(data: bytes) -> dict[str, Any]:
    """What `pack` was given. Raises struct.error for bytes that are too few."""
    version, *internal, has_gauss, gauss = _PYTHON.unpack_from(data)
    *keys, position, has_cached, cached = _NUMPY.unpack_from(data, _PYTHON.size)
    return {
        "python": (version, tuple(internal), gauss if has_gauss else None),
        "numpy": ("MT19937", numpy.array(keys, dtype=numpy.uint32), position, int(has_cached), cached),
        "torch": torch.frombuffer(bytearray(data[_PYTHON.size + _NUMPY.size :]), dtype=torch.uint8),
    }


def states_of(generators: list[torch.Generator]) -> list[torch.Tensor]:
    """Where generators stand."""
    return [generator.get_state() for generator in generators]


def set_states(generators: list[torch.Generator], states: list[torch.Tensor]) -> None:
    """Brings generators to where `states_of` found them."""
    for generator, state in zip(generators, states, strict=False):
        generator.set_state(state)
