"""The random generators of a process as values: taken, set, and written down without pickle."""

from __future__ import annotations

import random
import struct
from typing import Any

import numpy
import torch

_PYTHON = struct.Struct("<i625I?d")
_NUMPY = struct.Struct("<624Ii?d")


def capture() -> dict[str, Any]:
    """Python's, numpy's and torch's on the CPU: 10 microseconds."""
    return {"python": random.getstate(), "numpy": numpy.random.get_state(), "torch": torch.get_rng_state()}


def capture_gpus() -> dict[str, Any]:
    """Those of the GPUs, to be joined to `capture`'s."""
    return {"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {}


def restore(state: dict[str, Any]) -> None:
    """Sets what `capture` took."""
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
