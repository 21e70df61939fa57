"""Objects of Python's and numpy's own classes that keep a value inside: their state as a plain value, and back."""

from __future__ import annotations

import array
import collections
import contextvars
import ctypes
import io
import multiprocessing.sharedctypes
import queue
import random
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from hf_spot.training.state.values import is_tensor, is_value, mark_of, plain_of_bits, put_into

# Their attributes are the state.
NAMESPACES = (types.SimpleNamespace, collections.UserDict, collections.UserList, collections.UserString, collections.ChainMap)
WEAK = (weakref.WeakKeyDictionary, weakref.WeakValueDictionary)
_MOST_BYTES = 1 << 20
_SYNCHRONIZED = (multiprocessing.sharedctypes.SynchronizedBase,)
_CTYPES: tuple[Any, ...] = (ctypes._SimpleCData, ctypes.Array, ctypes.Structure)
_QUEUES = (queue.Queue, queue.LifoQueue, queue.PriorityQueue)
_CONTAINERS = (list, dict, set, collections.deque)


@dataclass(frozen=True)
class Adapter:
    """The state of an object as a plain value.

    Args:
        get: returns it.
        set: restores it in the object.
    """

    get: Callable[[], Any]
    set: Callable[[Any], None]


def adapter_of(value: Any) -> Adapter | None:
    """Return how the state of an object is read and restored in place; None if it is of no known kind."""
    if isinstance(value, _CONTAINERS):
        return _of_container(value)
    for kinds, make in _MAKERS:
        if isinstance(value, kinds):
            return make(value)
    return None


def opaque_mark_of(value: Any) -> Any:
    """Return a mark of an object whose state can be told, but not restored; it changes with the state. None if it can't."""
    if type(value) in (torch.Tensor, torch.nn.Parameter):  # sparse, quantized, or of several lengths
        return "tensor", id(value), value._version
    if isinstance(value, numpy.ma.MaskedArray):
        return mark_of(numpy.asarray(value.data)), mark_of(numpy.ma.getmaskarray(value))
    if isinstance(value, numpy.ndarray):  # of objects
        items = value.ravel()[:_MOST_BYTES].tolist()
        return value.shape, mark_of(items) if is_value(items) else len(items)
    if isinstance(value, numpy.random.SeedSequence):
        return "SeedSequence", value.n_children_spawned
    if isinstance(value, queue.SimpleQueue):
        return "SimpleQueue", value.qsize()
    if isinstance(value, types.MappingProxyType):
        items = dict(value)
        return "mappingproxy", mark_of(items) if is_value(items) else len(items)
    if isinstance(value, memoryview) and value.nbytes <= _MOST_BYTES:
        return "memoryview", value.tobytes()
    if isinstance(value, random.SystemRandom):
        return ()  # which has no state
    shape = getattr(value, "shape", None)
    if type(value).__module__.partition(".")[0] == "pandas" and isinstance(shape, tuple):
        small = value.to_numpy() if value.size <= _MOST_BYTES // 8 else None
        return shape, None if small is None else mark_of(small if small.dtype != object else repr(small.tolist()))
    return None


def _of_container(value: Any) -> Adapter | None:
    """Return the adapter of an object of a class that the script has derived from a container."""
    base = next(kind for kind in _CONTAINERS if isinstance(value, kind))

    def fill(new: Any) -> None:
        held = put_into(base(value), new)
        value.clear()
        value.extend(held) if isinstance(value, (list, collections.deque)) else value.update(held)

    try:
        return Adapter(lambda: base(value), fill) if is_value(base(value)) else None
    except Exception:  # foreign code: a class may iterate otherwise
        return None


def _of_array(value: array.array[Any]) -> Adapter:
    def fill(new: Any) -> None:
        value[:] = array.array(value.typecode, new)

    return Adapter(value.tobytes, fill)


def _of_ctypes(value: Any) -> Adapter:
    size = ctypes.sizeof(value)
    return Adapter(
        lambda: ctypes.string_at(ctypes.addressof(value), size), lambda new: _move(ctypes.addressof(value), new, size)
    )


def _move(address: int, new: bytes, size: int) -> None:
    if len(new) != size:
        raise ValueError(f"{len(new)} bytes for {size}")
    ctypes.memmove(address, new, size)


def _of_synchronized(value: Any) -> Adapter:
    return _of_ctypes(value.get_obj())


def _of_text(value: Any) -> Adapter:
    def fill(new: Any) -> None:
        text, place = new
        value.seek(0)
        value.truncate()
        value.write(text)
        value.seek(place)

    return Adapter(lambda: [value.getvalue(), value.tell()], fill)


def _of_queue(value: Any) -> Adapter:
    def fill(new: Any) -> None:
        with value.mutex:
            value.queue.clear()
            value.queue.extend(new)

    return Adapter(lambda: list(value.queue), fill)


def _of_context(value: contextvars.ContextVar[Any]) -> Adapter:
    return Adapter(lambda: value.get(None), lambda new: void(value.set(new)))


def _of_bits(value: Any) -> Adapter:
    def fill(new: Any) -> None:
        value.state = plain_of_bits(new, back=True)

    return Adapter(lambda: plain_of_bits(value.state), fill)


def _of_subclass(value: numpy.ndarray) -> Adapter | None:
    if value.dtype.hasobject or isinstance(value, numpy.ma.MaskedArray):
        return None

    def fill(new: Any) -> None:
        if new.shape != value.shape:
            raise ValueError(f"shape {new.shape} for {value.shape}")
        value[...] = new

    return Adapter(lambda: numpy.array(value, subok=False), fill)


def _of_tensor(value: torch.Tensor) -> Adapter | None:
    plain = value.as_subclass(torch.Tensor)
    if not is_tensor(plain):
        return None

    def fill(new: Any) -> None:
        if new.shape != plain.shape:
            raise ValueError(f"shape {new.shape} for {plain.shape}")
        plain.detach().copy_(new)

    return Adapter(lambda: plain.detach(), fill)


def void(_: Any) -> None:
    """Drop a result."""


_MAKERS: list[tuple[Any, Callable[[Any], Adapter | None]]] = [
    (array.array, _of_array),
    (_CTYPES, _of_ctypes),
    (_SYNCHRONIZED, _of_synchronized),
    ((io.StringIO, io.BytesIO), _of_text),
    (_QUEUES, _of_queue),
    (contextvars.ContextVar, _of_context),
    (numpy.random.BitGenerator, _of_bits),
    (numpy.ndarray, _of_subclass),
    (torch.Tensor, _of_tensor),
]


def items_of_weak(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the entries of a weak dictionary that are there now."""
    yield from list(value.items())
